"""The plain backend: every rank holds all weights, and gradients are summed over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fine_dist.engine.backend import Backend, Piece
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.dist import World, all_reduce_sum
from fine_dist.engine.optimizer import MOMENTS, adamw, only_where, set_lr, trainable, updates_of
from fine_dist.engine.settings import OptimConfig


class PlainBackend(Backend):
    """Holds all weights on every rank; rank 0 owns them in checkpoints."""

    def __init__(self, model: nn.Module, optim: OptimConfig, world: World) -> None:
        self.world = world
        self.model = model.to(world.device)
        self.clip_norm = optim.clip_norm
        self.named = trainable(self.model)
        self.parameters = list(self.named.values())
        self.optimizer = adamw(self.parameters, optim)

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        (losses.sum() / global_batch).backward()

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        # A parameter that no sample used has a zero gradient, not none: the same arithmetic as under ZeRO.
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.world.world_size > 1:
            self._sum_over_ranks(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        set_lr(self.optimizer, lr)
        finite = norm.isfinite()
        with only_where(self.optimizer, finite if good is None else finite & good):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum_over_ranks(self, gradients: list[Tensor]) -> None:
        """One all-reduce of all gradients."""
        flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in gradients]), self.world)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def pieces(self) -> list[Piece]:
        if not self.world.is_main:
            return []
        return [Piece(name, tuple(p.shape), 0, p.data.view(-1)) for name, p in self.named.items()]

    def gather(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {piece.name: values[piece.name].detach().cpu().view(piece.shape).clone() for piece in self.pieces()}

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.named[piece.name], {})
        return {key: state[key].view(-1) for key in MOMENTS if updates_of(state)}

    def optimizer_steps(self) -> dict[str, int]:
        found = {name: updates_of(self.optimizer.state.get(p, {})) for name, p in self.named.items()}
        return {name: updates for name, updates in found.items() if updates}

    def load(self, checkpoint: CheckpointReader) -> None:
        for name, p in self.named.items():
            p.data.copy_(checkpoint.whole("weight", name).view_as(p))
            steps = checkpoint.optimizer_steps.get(name, 0)
            if not steps:
                self.optimizer.state.pop(p, None)
                continue
            state = {key: checkpoint.whole(key, name).view_as(p).to(p.device).clone() for key in MOMENTS}
            # A fused optimizer keeps its step count on the device, the others in host memory.
            fused = bool(self.optimizer.defaults.get("fused"))
            state["step"] = torch.tensor(float(steps), device=p.device if fused else "cpu")
            self.optimizer.state[p] = state
