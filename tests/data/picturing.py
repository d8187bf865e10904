"""Images to encode, the settings that encode them, and hashes of what came of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from fine_dist.encode import EncodeConfig


def picture(seed: int, width: int = 70, height: int = 50) -> Image.Image:
    """A smooth random image: what is left of it after JPEG is close to what went in."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def config(folder: Path, out: Path, **fields) -> EncodeConfig:
    return EncodeConfig(
        **{"source": str(folder), "out": str(out), "image_size": 32, "shard_samples": 8, "batch": 4, **fields}
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
