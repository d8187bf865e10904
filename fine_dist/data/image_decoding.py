"""Image files as arrays: decoding with Pillow, 8-bit RGB, and the center crop on which published FIDs are based.

Shapes: an image is uint8 [3, H, W].
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from fine_dist.core.regular_files import check_regular
from fine_dist.model.arch import Sides, both

FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "BMP": ("bmp",),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
"""Image formats by Pillow's names, which are recognized by content, and the suffixes of their files."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""Suffixes of image files, in lower case; upper case is accepted as well."""
WHITE = (255, 255, 255)
Color: TypeAlias = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""


def center_crop(image: Image.Image, size: Sides, background: Color = WHITE) -> np.ndarray:
    """Resize an image and crop its center to a height and width, or to a square: uint8 [3, H, W].

    The arithmetic is ADM's (arXiv 2105.05233), on which published FIDs are based: halve with a box filter while both
    sides are at least twice the target, resize bicubically until one side equals the target and the other is no
    smaller, and crop the center. Before that the image is rotated by its EXIF orientation and composited onto the
    background.

    Raises:
        ValueError: Pixel values have an unknown white level.
    """
    image = to_rgb(ImageOps.exif_transpose(image), background)
    height, width = both(size)
    # Bicubic interpolation alone would skip pixels when it shrinks an image by more than half, which aliases.
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))  # [H, W, 3]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_rgb(image: Image.Image, background: Color = WHITE) -> Image.Image:
    """An image in 8-bit RGB: 16-bit values are scaled down, transparent parts are composited onto the background."""
    # Pillow's `convert` clips 16-bit values at 255, which makes most of such an image white.
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    bands = image.getbands()
    if "A" in bands or "a" in bands or "transparency" in image.info:
        under = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(under, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """8-bit gray of 16-bit values (white is 65535) or floats (white is 1); Pillow's own conversion would clip."""
    values, white = np.asarray(image), 1 if image.mode == "F" else 65535
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= 0 and high <= white):
        raise ValueError(f"gray from {low:g} to {high:g} in mode {image.mode}; legal: 0 to {white}")
    gray = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


def read_image(file: BinaryIO | Path, size: Sides, background: Color) -> np.ndarray:
    """`center_crop` of an image file; of animations and multi-page files the first image."""
    if isinstance(file, Path):
        check_regular(file)
    # Only these decoders, because others, such as PostScript's, run external programs.
    with Image.open(file, formats=[*FORMATS]) as image:
        return center_crop(image, size, background)
