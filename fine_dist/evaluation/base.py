"""What a feature network gives, whichever it is, and the forms that images come in.

Shapes: N images, F pooled features, S spatial features, K classes of its own, C channels, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fine_dist.sampling.image_grid import to_uint8


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


def as_rgb(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] of any images that `to_uint8` takes; grey ones three times over."""
    images = to_uint8(images)
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)


def as_signed(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images; floating point as it is."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
