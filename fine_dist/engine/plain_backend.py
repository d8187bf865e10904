"""The plain backend: every rank holds all weights, and gradients are summed over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fine_dist.engine.backend import Backend, Piece
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.dist import World
from fine_dist.engine.gradient_buckets import GradientBuckets
from fine_dist.engine.optimizer import MOMENTS, adamw, clip_divisor, only_where, set_lr, trainable, updates_of
from fine_dist.engine.settings import OptimConfig


class PlainBackend(Backend):
    """Holds all weights on every rank; rank 0 owns them in checkpoints.

    Args:
        reduce_dtype: What gradients travel in between ranks.
    """

    def __init__(
        self, model: nn.Module, optim: OptimConfig, world: World, reduce_dtype: torch.dtype = torch.float32
    ) -> None:
        self.world = world
        self.model = model.to(world.device)
        self.clip_norm = optim.clip_norm
        self.named = trainable(self.model)
        self.parameters = list(self.named.values())
        self.optimizer = adamw(self.parameters, optim)
        # Alone, a rank lets autograd hand its gradients over: a bucket would add one more pass over all of them.
        self.buckets = GradientBuckets(self.parameters, reduce_dtype) if world.world_size > 1 else None

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        if self.buckets and last:
            self.buckets.start()
        (losses.sum() / global_batch).backward()
        if self.buckets and last:
            self.buckets.send_rest()

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        if self.buckets:
            self.buckets.wait()
        norm = torch.nn.utils.get_total_norm(self.buckets.flat if self.buckets else self._gradients())
        set_lr(self.optimizer, lr)
        finite = norm.isfinite()
        with only_where(self.optimizer, finite if good is None else finite & good, clip_divisor(norm, self.clip_norm)):
            self.optimizer.step()
        if self.buckets:
            self.buckets.zero()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _gradients(self) -> list[Tensor]:
        """All gradients. One that no sample used is zero, not absent: the same arithmetic as in every other backend."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters if p.grad is not None]

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
