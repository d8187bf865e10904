"""Small data sets of gray images that are read into memory: scikit-learn's digits, and IDX files (MNIST's format).

The digits need no download (1,797 images of 8x8, ten classes). Debian's package dataset-fashion-mnist puts 70,000
Fashion-MNIST images on a machine as IDX files: two zero bytes, the type of the numbers (8: unsigned bytes), how many
axes there are, the length of each as a big-endian 32-bit integer; then the numbers. Files may be gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fine_dist.core.config import expand_path
from fine_dist.core.errors import DataError
from fine_dist.core.regular_files import read_bytes
from fine_dist.data.images import ImageItem
from fine_dist.data.settings import DIGIT_SIDE

NUM_TRAIN = 1500
SPLITS = ("train", "held_out")


def digits(split: str = "train", side: int = DIGIT_SIDE) -> tuple[np.ndarray, np.ndarray]:
    """The images of a split: float32 [N, 1, side, side] in [-1, 1], and labels int64 [N].

    `train` is the first 1,500 in scikit-learn's order, `held_out` the other 297. A side other than their own 8 pixels
    resizes them by bicubic interpolation, clipped to [-1, 1]. `DataError` for another split.
    """
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise DataError(f"digits have no split {split!r}; legal: {', '.join(SPLITS)}")
    data = load_digits()
    part = slice(None, NUM_TRAIN) if split == "train" else slice(NUM_TRAIN, None)
    # gray values are 0..16: the result is exact in float16
    images = (data.images[part] / 8.0 - 1.0).astype(np.float32)
    if side != DIGIT_SIDE:
        resize = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
        images = np.stack([np.asarray(image) for image in resize]).clip(-1, 1)
    return images[:, None], data.target[part].astype(np.int64)


class DigitImages:
    """A split of scikit-learn's digits: float32 [1, side, side] in [-1, 1]."""

    def __init__(self, split: str, *, side: int = DIGIT_SIDE, per_unit: int, limit: int | None = None) -> None:
        images, labels = digits(split, side)
        self.images, self.labels, self.per_unit = images[:limit], labels[:limit], per_unit
        self.count = len(self.images)
        self.units = -(-self.count // per_unit)
        self.num_classes, self.class_names = 10, tuple("0123456789")
        self.left_out: tuple[str, ...] = ()
        self.fingerprint = hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def items(self, unit: int) -> Iterator[ImageItem]:
        for i in range(unit * self.per_unit, min((unit + 1) * self.per_unit, self.count)):
            yield ImageItem(f"digits:{i}", int(self.labels[i]), lambda i=i: self.images[i])  # type: ignore[misc]


FILES = {"train": "train", "held_out": "t10k"}
"""Prefix of the file names of each split."""
PACKAGE = "apt-get install dataset-fashion-mnist (it puts them in /usr/share/datasets/fashion-mnist)"
_BYTES = 8
"""IDX type code of unsigned bytes."""


class IdxImages:
    """A split of a folder of IDX files: uint8 [1, H, W]; `train` is train-*, `held_out` is t10k-*.

    `DataError` for another split, and for files that are not there (saying what to install), damaged, or do not belong
    together.
    """

    def __init__(self, folder: str, split: str, *, per_unit: int, limit: int | None = None) -> None:
        if split not in FILES:
            raise DataError(f"split: idx files have no split {split!r}; legal: {', '.join(FILES)}")
        root, head = Path(expand_path(folder)), FILES[split]
        self.name = f"{head}-images-idx3-ubyte"
        self.images = read_idx(root, self.name, 3)[:limit]
        self.labels = read_idx(root, f"{head}-labels-idx1-ubyte", 1)[:limit]
        if len(self.images) != len(self.labels):
            raise DataError(f"source: {root}: {len(self.images)} images and {len(self.labels)} labels in {split}")
        self.count, self.per_unit = len(self.images), per_unit
        self.units = -(-self.count // per_unit)
        self.num_classes = int(self.labels.max(initial=0)) + 1
        self.class_names = tuple(map(str, range(self.num_classes)))
        self.left_out: tuple[str, ...] = ()
        self.fingerprint = hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def items(self, unit: int) -> Iterator[ImageItem]:
        for i in range(unit * self.per_unit, min((unit + 1) * self.per_unit, self.count)):
            yield ImageItem(f"{self.name}:{i}", int(self.labels[i]), lambda i=i: self.images[i][None])  # type: ignore[misc]


def read_idx(folder: Path, name: str, axes: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Args:
        folder: Folder of the file.
        name: Its name, without `.gz`.
        axes: Number of dimensions that it must have.

    Raises:
        DataError: The file is missing or damaged, or holds something else.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"source: {folder} has no {name} or {name}.gz; for Fashion-MNIST: {PACKAGE}")
    try:
        content = read_bytes(path)
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"source: {path} cannot be read: {error}") from None
    head = 4 + 4 * axes
    # The header is checked before memory is allocated by its numbers.
    if len(content) < head or content[:4] != bytes([0, 0, _BYTES, axes]):
        raise DataError(f"source: {path} is no IDX file of unsigned bytes with {axes} axes")
    shape = struct.unpack(f">{axes}I", content[4:head])
    if len(content) - head != math.prod(shape):
        raise DataError(f"source: {path} holds {len(content) - head} numbers, and its head says {list(shape)}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
