"""A batch of latents: stored numbers as the shards hold them, converted to float32 latents on the device.

A stream yields the stored float16 numbers, which are half the bytes of float32. The batch converts them to `(float32(x)
- shift) * float32(scale)` on the device. Each operation is rounded once, so that every device and batch size gives the
same bits.

Letters: B samples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from fine_dist.data.manifest import Channels

_NOISE = 0x6D6F6D656E7473
"""Random stream of the noise of moments, different from every other use of (seed, step, position)."""


@dataclass(frozen=True)
class Batch:
    """A process's part of a global batch.

    Attributes:
        stored: [B, C, H, W] in the shards' dtype, unscaled; for moments, the sampled and scaled latents in float32.
        scale, shift: Of `(stored - shift) * scale`, one number for all channels or one for each.
        labels: int64 [B].
        positions: int64 [B], positions in the global batch; all randomness of a sample is seeded by (seed, step,
            position).
        tokens: [B, E, h, w], an image encoder's tokens of the clean images, if the stream reads them.
    """

    step: int
    epoch: int
    stored: torch.Tensor
    scale: Channels
    labels: torch.Tensor
    positions: torch.Tensor
    shift: Channels = 0.0
    tokens: torch.Tensor | None = None

    @cached_property
    def latents(self) -> torch.Tensor:
        """float32 [B, C, H, W], shifted and scaled; converted once, on the device of `stored`."""
        return as_float(self.stored, self.scale, self.shift)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, in the stored dtype. Positions stay in host memory, where random numbers are drawn."""
        if device.type == "cpu":
            return self
        # Only a copy from page-locked memory is asynchronous.
        stored, labels = (x.pin_memory().to(device, non_blocking=True) for x in (self.stored, self.labels))
        tokens = None if self.tokens is None else self.tokens.pin_memory().to(device, non_blocking=True)
        return replace(self, stored=stored, labels=labels, tokens=tokens)

    def part(self, start: int, size: int) -> Batch:
        """A micro-batch: `size` samples from `start` on."""
        rows = slice(start, start + size)
        stored, labels, positions = self.stored[rows], self.labels[rows], self.positions[rows]
        tokens = None if self.tokens is None else self.tokens[rows]
        return replace(self, stored=stored, labels=labels, positions=positions, tokens=tokens)


def as_float(stored: torch.Tensor, scale: Channels, shift: Channels = 0.0) -> torch.Tensor:
    """`(stored - shift) * scale` in float32, for any float dtype and device; may return `stored` itself.

    stored: [..., C, H, W].
    """
    if isinstance(scale, tuple) or isinstance(shift, tuple):
        return (stored.float() - by_channel(shift, stored.device)).mul_(by_channel(scale, stored.device))
    if shift:
        return (stored.float() - shift).mul_(scale)
    if scale == 1:
        return stored.float()
    return stored.float().mul_(scale) if stored.dtype != torch.float32 else stored * scale


@lru_cache(maxsize=64)
def by_channel(values: Channels, device: torch.device) -> torch.Tensor:
    """One number per channel as float32 [C, 1, 1] ([1, 1, 1] for a single number) on the device, cached."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def draw_moments(moments: torch.Tensor, seed: int, step: int, first: int) -> torch.Tensor:
    """Sample latents [B, C, H, W] from their moments [B, 2C, H, W] (mean, then standard deviation).

    Args:
        moments: float [B, 2C, H, W].
        seed: Seed of the run.
        step: Step of the batch.
        first: Position of row 0 in the global batch. The noise of a sample is seeded by (seed, step, position), so that
            it does not depend on the world size.
    """
    mean, std = moments.chunk(2, dim=1)
    noise = np.empty(mean.shape, np.float32)
    for row in range(len(noise)):
        # Philox is a function of key and counter: the noise of any
        # (seed, step, position) is reached without the draws before it.
        rng = np.random.Generator(np.random.Philox(key=[seed, _NOISE], counter=[0, 0, first + row, step]))
        rng.standard_normal(dtype=np.float32, out=noise[row])
    return torch.addcmul(mean, std, torch.from_numpy(noise))
