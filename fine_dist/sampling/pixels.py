"""Pixels from a model's output: floats in [-1, 1] become the bytes that a picture file holds."""

from __future__ import annotations

import torch
from torch import Tensor

from fine_dist.core.errors import DataError


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
