"""The plain backend: every rank holds all weights, and gradients are summed over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fine_dist.engine.backend import Backend, Piece
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.gradient_buckets import GradientBuckets
from fine_dist.engine.host_copy import copy_to_host
from fine_dist.engine.optimizer import MOMENTS, adamw, clip_divisor, only_where, set_lr, trainable, updates_of
from fine_dist.engine.replica_check import broadcast_tensors
from fine_dist.engine.settings import OptimConfig
from fine_dist.engine.world import World


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
            # Only the last micro-batch's backward pass may send: gradients are sums over all micro-batches.
            self.buckets.start()
        (losses.sum() / global_batch).backward()
        if self.buckets and last:
            self.buckets.send_rest()

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        if self.buckets:
            self.buckets.wait()
        # Over flat buckets, so that a norm of a thousand parameters is a few kernels.
        norm = torch.nn.utils.get_total_norm(self.buckets.flat if self.buckets else self._gradients())
        set_lr(self.optimizer, lr)
        finite = norm.isfinite()
        with only_where(self.optimizer, finite if good is None else finite & good, clip_divisor(norm, self.clip_norm)):
            self.optimizer.step()
        if self.buckets:
            self.buckets.zero()
        else:
            # Freed, so that the next backward pass writes gradients instead of adding to zeros.
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
        pieces = self.pieces()
        copies = copy_to_host([values[piece.name] for piece in pieces])
        return {piece.name: copy.view(piece.shape) for piece, copy in zip(pieces, copies)}

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.named[piece.name], {})
        return {key: state[key].view(-1) for key in MOMENTS if key in state}

    def optimizer_steps(self) -> dict[str, int]:
        return updates_of({name: self.optimizer.state.get(p, {}) for name, p in self.named.items()})

    @torch.no_grad()
    def load(self, checkpoint: CheckpointReader) -> None:
        """Rank 0 reads the files and sends them on: hundreds of ranks would read the same bytes from one file
        system."""
        for name, p in self.named.items():
            steps = checkpoint.optimizer_steps.get(name, 0)
            # The moments of a run that is resumed in a process that has trained before must not survive.
            self.optimizer.state.pop(p, None)
            if steps:
                # A fused optimizer counts its updates on the device.
                state: dict[str, Tensor] = {"step": torch.tensor(float(steps), device=p.device)}
                self.optimizer.state[p] = {**state, **{key: torch.zeros_like(p) for key in MOMENTS}}
            if self.world.is_main:
                p.copy_(checkpoint.whole("weight", name).view_as(p))
                for key in MOMENTS if steps else ():
                    self.optimizer.state[p][key].copy_(checkpoint.whole(key, name).view_as(p))
        # Weights and moments travel together in few large messages; every rank has made room for them above.
        moments = [
            self.optimizer.state[p][key] for p in self.parameters if p in self.optimizer.state for key in MOMENTS
        ]
        broadcast_tensors([*(p.data for p in self.parameters), *moments], self.world)
