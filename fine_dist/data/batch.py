"""A batch of latents: as the shards store them, and as float32 where they are used.

What a disk, a bus or another thread hands on is the stored bytes, half of float32's. The conversion is one rounding of
one product, `float32(x) * float32(scale)`, wherever it is done, so that every device and every batch size finds the
same bits.

B samples of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

_NOISE = 0x6D6F6D656E7473
"""Keeps the noise of moments apart from every other use of (seed, step, position)."""


@dataclass(frozen=True)
class Batch:
    """A process's part of a global batch.

    stored:    [B, C, H, W] in the shards' dtype, unscaled; of moments, the drawn latents in float32.
    scale:     what `stored` is multiplied by.
    labels:    int64 [B].
    positions: int64 [B], places in the global batch; seed whatever is random by (seed, step, position).
    """

    step: int
    epoch: int
    stored: torch.Tensor
    scale: float
    labels: torch.Tensor
    positions: torch.Tensor

    @cached_property
    def latents(self) -> torch.Tensor:
        """float32 [B, C, H, W], multiplied by the scaling factor; converted on its device when first asked for."""
        return as_float(self.stored, self.scale)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Batch:
        """On the device, as stored; positions stay in host memory, where randomness is drawn."""
        if device.type == "cpu":
            return self
        # from page-locked memory alone does a copy to a GPU go on beside the host's work
        stored, labels = (x.pin_memory().to(device, non_blocking=True) for x in (self.stored, self.labels))
        return replace(self, stored=stored, labels=labels)

    def part(self, start: int, size: int) -> Batch:
        """Some samples of it: a micro-batch."""
        rows = slice(start, start + size)
        return replace(self, stored=self.stored[rows], labels=self.labels[rows], positions=self.positions[rows])


def as_float(stored: torch.Tensor, scale: float) -> torch.Tensor:
    """`stored`, of any float dtype and on any device, as float32 times `scale`; itself where nothing is to be done."""
    if scale == 1:
        return stored.float()
    return stored.float().mul_(scale) if stored.dtype != torch.float32 else stored * scale


def draw_moments(moments: torch.Tensor, seed: int, step: int, first: int) -> torch.Tensor:
    """Sample latents from their moments [B, 2C, H, W] (mean, then standard deviation): [B, C, H, W].

    The noise of a sample is seeded by (seed, step, position), so it is the same on every world size.
    """
    mean, std = moments.chunk(2, dim=1)
    noise = np.empty(mean.shape, np.float32)
    for row in range(len(noise)):
        rng = np.random.Generator(np.random.Philox(key=[seed, _NOISE], counter=[0, 0, first + row, step]))
        rng.standard_normal(dtype=np.float32, out=noise[row])
    return torch.addcmul(mean, std, torch.from_numpy(noise))
