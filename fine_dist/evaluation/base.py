"""What a feature network gives, whichever it is, and the forms that images come in.

Shapes: N images, F pooled features, S spatial features, K classes of its own, C channels, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fine_dist.core.errors import DataError


@dataclass(frozen=True)
class Extracted:
    """Of a batch, float32: pooled [N, F]; spatial [N, S] and logits [N, K] where the network has them."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Features(Protocol):
    """A frozen network: `features(images) -> Extracted`, on whatever device its weights are.

    name:         `inception`, `dinov2`, `efflite` or `classifier`.
    distance:     what the Fréchet distance on its pooled features is called: FID, FDD, FD-EffLite, FD-classifier.
    num_features: F.
    identity:     sha256 of its weights (or their file): two numbers compare only where it is equal.
    """

    @property
    def name(self) -> str: ...
    @property
    def distance(self) -> str: ...
    @property
    def num_features(self) -> int: ...
    @property
    def identity(self) -> str: ...

    def __call__(self, images: Tensor) -> Extracted:
        """images: uint8 [N, C, H, W], or floating point in [-1, 1]; C is 1 or 3. `DataError` when they do not fit."""


def as_uint8(images: Tensor) -> Tensor:
    """Images [N, C, H, W] as uint8: of floats in [-1, 1] the nearest of 256 levels, as if they had been saved."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"images must be [N, 1 or 3, H, W], not {list(images.shape)}; latents are decoded first")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}; legal: uint8, or floating point in [-1, 1]")
    if not torch.isfinite(images).all():
        raise DataError("an image has NaN or infinite pixels")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def as_rgb(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] of any images that `as_uint8` takes; grey ones three times over."""
    images = as_uint8(images)
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)


def as_signed(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images; floating point as it is."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
