"""Pictures of many images: a grid with a caption over each, a title, and a word beside each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_GAP, _TEXT, _SIDE = 4, 14, 64
"""Pixels between cells, of a line of text, and of the smallest side that an image is shown with."""


def labelled_grid(
    images: Tensor, captions: Sequence[str], columns: int, *, title: str = "", rows: Sequence[str] = ()
) -> Tensor:
    """A picture [3, H', W'] uint8 of images uint8 [N, 1 or 3, H, W], row by row.

    captions: one an image, over it; cut to its width. title: over the whole. rows: names of the rows, at their left.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

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


def shown(latents: Tensor) -> Tensor:
    """Undecoded latents [N, C, h, w] as something to look at, uint8: -3..3 as black to white, 3 channels at most."""
    import torch

    latents = latents[:, : 3 if latents.shape[1] >= 3 else 1]
    return ((latents + 3) / 6 * 255).round().clamp(0, 255).to(torch.uint8)


def save_png(picture: Tensor, path: Path) -> None:
    """Write a picture uint8 [1 or 3, H, W], whole or not at all."""
    import io

    from PIL import Image

    from fine_dist.core.files import write_atomic

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
