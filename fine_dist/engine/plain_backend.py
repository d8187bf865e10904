"""The plain backend: every rank holds all weights, and gradients are summed over ranks.

All ranks hold the same weights and moments. Each rank owns an equal share of them, a range of all values laid end to
end: it stores the EMA of that range only, and writes that range to checkpoints.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from fine_dist.engine import dist
from fine_dist.engine.backend import Piece, ShardedBackend
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.gradient_buckets import GradientBuckets
from fine_dist.engine.host_copy import copy_to_host
from fine_dist.engine.optimizer import MOMENTS, adamw, clip_divisor, set_lr, trainable, update_only_if, updates_of
from fine_dist.engine.replica_check import broadcast_tensors
from fine_dist.engine.settings import OptimConfig
from fine_dist.engine.weight_copies import WeightCopies
from fine_dist.engine.world import World


class PlainBackend(ShardedBackend):
    """Holds all weights on every rank; each rank owns an equal share of them for averages and checkpoints.

    Args:
        reduce_dtype: Data type of gradients in the all-reduce.
        bf16_copies: Whether products use bf16 copies of the weights (`weight_copies`).
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        world: World,
        reduce_dtype: torch.dtype = torch.float32,
        bf16_copies: bool = False,
    ) -> None:
        self.world = world
        self.model = model.to(world.device)
        self.clip_norm = optim.clip_norm
        self.named = trainable(self.model)
        self.parameters = list(self.named.values())
        self.shapes = {name: tuple(p.shape) for name, p in self.named.items()}
        self._layout = [self._share_of(rank) for rank in range(world.world_size)]
        self.optimizer = adamw(self.parameters, optim)
        self.copies = WeightCopies(self.model) if bf16_copies else None
        # With one rank autograd's own gradients are used, because a bucket would add a pass over all of them.
        copies = self.copies.trained if self.copies else {}
        self.buckets = GradientBuckets(self.parameters, reduce_dtype, copies=copies) if world.world_size > 1 else None

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return self.copies.installed() if self.copies else contextlib.nullcontext()

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        if self.buckets and last:
            # Only the last micro-batch may send, because gradients are sums over all micro-batches.
            self.buckets.start()
        (losses.sum() / global_batch).backward()
        if self.buckets and last:
            self.buckets.send_rest()
        elif self.copies:
            self.copies.add_gradients()

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        if self.buckets:
            self.buckets.wait()
        # Over flat buckets, so that the norm of a thousand parameters takes a few kernels.
        norm = torch.nn.utils.get_total_norm(self.buckets.flat if self.buckets else self._gradients())
        set_lr(self.optimizer, lr)
        finite = norm.isfinite()
        with update_only_if(
            self.optimizer, finite if good is None else finite & good, clip_divisor(norm, self.clip_norm)
        ):
            self.optimizer.step()
        if self.buckets:
            self.buckets.zero()
        else:
            # Freed, so that the next backward pass writes gradients instead of adding them to zeros.
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _gradients(self) -> list[Tensor]:
        """All gradients; those of unused parameters are zero and not None, as in every other backend."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters if p.grad is not None]

    def _share_of(self, rank: int) -> list[tuple[str, int, int]]:
        """The ranges (name, start, stop) of a rank's share of all values."""
        total, ranks = sum(p.numel() for p in self.parameters), self.world.world_size
        first, last = rank * total // ranks, (rank + 1) * total // ranks
        share, before = [], 0
        for name, p in self.named.items():
            start, stop = max(0, first - before), min(p.numel(), last - before)
            if start < stop:
                share.append((name, start, stop))
            before += p.numel()
        return share

    def pieces(self) -> list[Piece]:
        return [
            Piece(name, self.shapes[name], start, self.named[name].data.view(-1)[start:stop])
            for name, start, stop in self._layout[self.world.rank]
        ]

    def weights(self) -> dict[str, Tensor]:
        if not self.world.is_main:
            return {}
        return dict(zip(self.named, copy_to_host([p.data for p in self.parameters])))

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.named[piece.name], {})
        return {key: state[key].view(-1)[piece.start : piece.stop] for key in MOMENTS if key in state}

    def optimizer_steps(self) -> dict[str, int]:
        owned = {name: self.named[name] for name, _, _ in self._layout[self.world.rank]}
        return updates_of({name: self.optimizer.state.get(p, {}) for name, p in owned.items()})

    @torch.no_grad()
    def load(self, checkpoint: CheckpointReader) -> None:
        """The first rank of each node reads the files and sends them on inside the node: hundreds of ranks would read
        the same bytes from one file system, and one rank's would cross the network once for every node."""
        with dist.node_group(self.world) as (first, node):
            for name, p in self.named.items():
                steps = checkpoint.optimizer_steps.get(name, 0)
                # The process may have trained before, and its moments must not remain.
                self.optimizer.state.pop(p, None)
                if steps:
                    # A fused optimizer counts its updates on the device.
                    state: dict[str, Tensor] = {"step": torch.tensor(float(steps), device=p.device)}
                    self.optimizer.state[p] = {**state, **{key: torch.zeros_like(p) for key in MOMENTS}}
                if self.world.rank == first:
                    p.copy_(checkpoint.read_full("weight", name).view_as(p))
                    for key in MOMENTS if steps else ():
                        self.optimizer.state[p][key].copy_(checkpoint.read_full(key, name).view_as(p))
            # Weights and moments are sent together in few large messages; every rank has allocated them above.
            states = [self.optimizer.state[p] for p in self.parameters if p in self.optimizer.state]
            moments = [state[key] for state in states for key in MOMENTS]
            broadcast_tensors([*(p.data for p in self.parameters), *moments], self.world, first, node)
