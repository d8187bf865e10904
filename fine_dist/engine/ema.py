"""The exponential moving average (EMA) of weights that train: fp32, sharded like them; its decay has a warm-up."""

from __future__ import annotations

import torch
from torch import Tensor

from fine_dist.engine.backend import Backend


class Ema:
    """`ema <- decay * ema + (1 - decay) * weight` after each update, for the pieces that this rank owns.

    With every backend a rank owns an equal share, so that nothing is gathered and nothing is stored twice.

    Args:
        backend: Owner of the weights.
        decay: Decay of the EMA; 0 makes it equal to the weights.
        warmup: Limit the decay of update t to (1 + t) / (10 + t), so that the EMA of a short run forgets the initial
            weights. Without it the decay is constant, as in DiT.
    """

    def __init__(self, backend: Backend, decay: float, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self._backend = backend
        self.values: dict[str, Tensor] = {piece.name: piece.weight.clone() for piece in backend.pieces()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Update the EMA with the weights after `updates` updates."""
        weights = [piece.weight for piece in self._backend.pieces()]
        if weights:
            # One kernel launch for many tensors: a large DiT has over a thousand
            # parameters, whose single launches would cost more than the arithmetic.
            torch._foreach_lerp_(list(self.values.values()), weights, 1.0 - self.decay_at(updates))

    def decay_at(self, updates: int) -> float:
        """The decay of update number `updates` (1, 2, ...)."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def gather(self) -> dict[str, Tensor]:
        """The EMA as full tensors (fp32, host memory) on rank 0; empty on other ranks."""
        return self._backend.gather(self.values)
