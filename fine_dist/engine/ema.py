"""The exponential moving average of the trainable weights, in fp32, kept as the weights are: in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from fine_dist.engine.backend import Backend


class Ema:
    """`ema <- decay * ema + (1 - decay) * weight` after each update, for the pieces that this rank owns.

    warmup: the decay of update t is at most (1 + t) / (10 + t), so that a short run's average has left its beginning
            behind; without it the decay is constant, as in DiT.

    Under ZeRO each rank averages its own shard, so nothing is gathered and nothing is kept twice.
    """

    def __init__(self, backend: Backend, decay: float, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self._backend = backend
        self.values: dict[str, Tensor] = {piece.name: piece.weight.clone() for piece in backend.pieces()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """One step of the average, towards the weights as they are now, after so many updates of them."""
        weights = [piece.weight for piece in self._backend.pieces()]
        if weights:
            torch._foreach_lerp_(list(self.values.values()), weights, 1.0 - self.decay_at(updates))

    def decay_at(self, updates: int) -> float:
        """The decay of the step that follows so many updates (1, 2, ...)."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def gather(self) -> dict[str, Tensor]:
        """The averages as whole tensors (fp32, host memory) on rank 0; empty on the other ranks."""
        return self._backend.gather(self.values)
