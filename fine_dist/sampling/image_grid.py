"""Grids of images with captions, titles and row names, and PNG files.

Shapes: N images, C channels, H, W height and width of an image, H', W' height and width of the grid, in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fine_dist.core.errors import DataError
from fine_dist.core.files import write_atomic

_GAP, _TEXT, _SIDE = 4, 14, 64
"""In pixels: the gap between cells, the height of a line of text, and the minimum of an image's longer side."""


def labelled_grid(
    images: Tensor, captions: Sequence[str], columns: int, *, title: str = "", rows: Sequence[str] = ()
) -> Tensor:
    """Return a grid, uint8 [3, H', W'], of images uint8 [N, 1 or 3, H, W], row by row.

    Args:
        images: The images. Small ones are magnified by an integer.
        captions: Text above each image, cut to its width.
        columns: Number of images in a row.
        title: Line above the grid.
        rows: Names of the rows, to their left.
    """
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    zoom = max(1, -(-_SIDE // max(images.shape[2:])))
    tiles = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3).permute(0, 2, 3, 1).contiguous().numpy()
    height, width = tiles.shape[1:3]
    columns = max(1, min(columns, len(tiles)))
    font = ImageFont.load_default(11)
    left = max((int(font.getlength(name)) + 2 * _GAP for name in rows), default=0)
    top = _TEXT + _GAP if title else 0
    num_rows = -(-len(tiles) // columns)
    size = (left + columns * (width + _GAP) + _GAP, top + num_rows * (height + _TEXT + _GAP) + _GAP)
    size = (max(size[0], int(font.getlength(title)) + 2 * _GAP), size[1])
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 2), title, fill="black", font=font)
    for i, tile in enumerate(tiles):
        x = left + _GAP + (i % columns) * (width + _GAP)
        y = top + (i // columns) * (height + _TEXT + _GAP)
        if i < len(captions):
            pen.text((x, y + 1), _cut(captions[i], width, font), fill="black", font=font)
        canvas.paste(Image.fromarray(tile), (x, y + _TEXT))
        if i % columns == 0 and i // columns < len(rows):
            pen.text((_GAP, y + _TEXT + height // 2 - 6), rows[i // columns], fill="black", font=font)
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def tile_images(
    images: Tensor, columns: int, *, low: float = -1.0, high: float = 1.0, gap: int = 1, zoom: int = 1
) -> Tensor:
    """Return a grid, float32 [1 or 3, H', W'] in 0..1, of images [N, C, H, W], row by row, without captions.

    Args:
        images: The images. The first three channels are shown, or the first if there are fewer than three.
        columns: Number of images in a row.
        low: Value that becomes black.
        high: Value that becomes white.
        gap: Width of the white lines between images, in pixels of the grid.
        zoom: Side in pixels of the square that each pixel becomes.

    Raises:
        ValueError: `images` does not have four dimensions, or is empty.
    """
    images = images.detach().float().cpu()
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be [N, C, H, W] with N > 0, not {list(images.shape)}")
    images = images[:, : 3 if images.shape[1] >= 3 else 1]
    images = ((images - low) / (high - low)).clamp(0, 1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[:, y : y + height, x : x + width] = image
    return canvas


def latents_as_images(latents: Tensor) -> Tensor:
    """Show latents [N, C, h, w] without decoding them: uint8 [N, 1 or 3, h, w], with -3 as black and 3 as white."""
    latents = latents[:, : 3 if latents.shape[1] >= 3 else 1]
    return ((latents + 3) / 6 * 255).round().clamp(0, 255).to(torch.uint8)


def to_uint8(images: Tensor) -> Tensor:
    """Convert images [N, 1 or 3, H, W] to uint8: floats in [-1, 1] are rounded to 256 levels, as in an image file.

    Raises:
        DataError: The images have another shape or dtype, or a pixel is not finite.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"images must be [N, 1 or 3, H, W], not {list(images.shape)}; latents are decoded first")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}; legal: uint8, or floating point in [-1, 1]")
    if not torch.isfinite(images).all():
        raise DataError("an image has NaN or infinite pixels")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(picture: Tensor, path: Path) -> None:
    """Write an image uint8 [1 or 3, H, W] to a PNG file, atomically."""
    pixels = picture.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, format="png")
    write_atomic(path, file.getvalue(), durable=False)


def _cut(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
