"""Images to encode: class folders, webdataset image shards, the embedded digits; cut into units of one shard each.

Arrays are uint8 [3, S, S] (S the image size), or float32 in [-1, 1] for the digits.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset as wds
from PIL import Image

from fine_dist.config import DataConfig, expand_path
from fine_dist.data.digits import digits
from fine_dist.data.sources import copy, is_remote, local_path
from fine_dist.errors import DataError

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
"""Kinds of image files, upper or lower case."""
_ORDER = 0x696D61676573
"""Keeps the order of images apart from other uses of the seed."""


@dataclass(frozen=True)
class Item:
    """One image of a unit: where it comes from, its label, and how to read it (`read` may raise anything)."""

    source: str
    label: int
    read: Callable[[], np.ndarray]


class Source(Protocol):
    """Images in units: the items of a unit are always the same, in the same order, in any process."""

    @property
    def units(self) -> int:
        """Number of units; each becomes a shard."""

    @property
    def count(self) -> int | None:
        """Images in all, where known beforehand."""

    @property
    def num_classes(self) -> int | None:
        """Classes, where known beforehand."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Their names, where known."""

    @property
    def fingerprint(self) -> str:
        """Changes when the list of images does."""

    def items(self, unit: int) -> Iterator[Item]:
        """The images of a unit."""


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """An image's central square, size x size: uint8 [3, size, size].

    The arithmetic of ADM (arXiv 2105.05233), which FIDs in the literature rest on: halve with a box filter while the
    shorter side is at least twice the size, then make the shorter side `size` bicubically, then cut out the middle.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))  # [S, S, 3]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class FolderImages:
    """ImageNet's layout: one sub-folder of images per class; labels are the sub-folders' places in sorted order.

    The images are shuffled once, by the seed, so that every shard holds all kinds of classes. Corrupt ones are found
    when they are read. `DataError` when there are no sub-folders or no images.
    """

    def __init__(self, root: str, *, image_size: int, per_unit: int, seed: int, limit: int | None = None) -> None:
        self.root, self.image_size, self.per_unit = Path(expand_path(root)), image_size, per_unit
        if not self.root.is_dir():
            raise DataError(f"source: {self.root}: there is no such folder")
        self.class_names = tuple(sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir()))
        files = [
            (f"{name}/{entry.name}", label)
            for label, name in enumerate(self.class_names)
            for entry in sorted(os.scandir(self.root / name), key=lambda entry: entry.name)
            if entry.name.rpartition(".")[2].lower() in SUFFIXES
        ]
        if not files:
            raise DataError(
                f"source: {self.root} has no images in sub-folders, one per class; kinds: {', '.join(SUFFIXES)}"
            )
        order = np.random.default_rng([seed, _ORDER]).permutation(len(files))[:limit]
        self.files = [files[i] for i in order]
        self.count = len(self.files)
        self.units = -(-self.count // per_unit)
        self.num_classes = len(self.class_names)
        self.fingerprint = hashlib.sha256("\n".join(name for name, _ in self.files).encode()).hexdigest()

    def items(self, unit: int) -> Iterator[Item]:
        for name, label in self.files[unit * self.per_unit : (unit + 1) * self.per_unit]:
            yield Item(name, label, lambda name=name: self._read(name))  # type: ignore[misc]

    def _read(self, name: str) -> np.ndarray:
        with Image.open(self.root / name) as image:
            return center_crop(image, self.image_size)


class TarImages:
    """webdataset image shards (`KEY.jpg`, `KEY.cls`), each of which becomes one latent shard, in its order.

    pattern: paths or URLs of .tar files, with braces. num_classes: None takes the largest label of all.
    """

    def __init__(
        self, pattern: str, *, image_size: int, data: DataConfig, num_classes: int | None, limit: int | None = None
    ) -> None:
        self.urls = [url if is_remote(url) else local_path(url) for url in wds.shardlists.expand_urls(pattern)]
        missing = [url for url in self.urls if not is_remote(url) and not os.path.isfile(url)]
        if missing:
            raise DataError(f"source: {missing[0]}: there is no such file ({len(missing)} of {len(self.urls)} missing)")
        self.image_size, self.num_classes, self._data = image_size, num_classes, data
        self.units, self.count = len(self.urls), None
        self.class_names: tuple[str, ...] = ()
        self.limit = limit if limit is None else -(-limit // self.units)
        self.fingerprint = hashlib.sha256("\n".join(self.urls).encode()).hexdigest()

    def items(self, unit: int) -> Iterator[Item]:
        url = self.urls[unit]
        with tempfile.NamedTemporaryFile(prefix="fine_dist-") as stream:
            path = url
            if is_remote(url):
                copy(url, stream, self._data)  # type: ignore[arg-type]
                path = stream.name
            for number, item in enumerate(self._samples(path, url)):
                if self.limit is not None and number >= self.limit:
                    return
                yield item

    def _samples(self, path: str, url: str) -> Iterator[Item]:
        broken: list[str] = []

        def stop(error: Exception) -> bool:
            broken.append(str(error).partition(" @ ")[0])
            return False

        samples = wds.WebDataset(
            [path], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False, handler=stop
        )
        name = url.rsplit("/", 1)[-1]
        for sample in samples:
            yield self._item(f"{name}:{sample['__key__']}", sample)
        if broken:
            yield Item(name, 0, lambda: _refuse(f"the tar is damaged: {broken[0]}"))

    def _item(self, source: str, sample: dict[str, Any]) -> Item:
        content = next((sample[kind] for kind in sample if kind.rpartition(".")[2].lower() in SUFFIXES), None)
        label = sample.get("cls", b"").strip()
        if content is None:
            return Item(source, 0, lambda: _refuse("it has no image"))
        if not label.isdigit():
            return Item(source, 0, lambda: _refuse(f"its label is {label[:20]!r}, not a whole number"))
        if self.num_classes is not None and int(label) >= self.num_classes:
            return Item(source, 0, lambda: _refuse(f"label {int(label)}, but num_classes is {self.num_classes}"))
        return Item(source, int(label), lambda: self._read(content))

    def _read(self, content: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(content)) as image:
            return center_crop(image, self.image_size)


class DigitImages:
    """A split of scikit-learn's digits, as they are: float32 [1, 8, 8] in [-1, 1]."""

    def __init__(self, split: str, *, per_unit: int, limit: int | None = None) -> None:
        images, labels = digits(split)
        self.images, self.labels, self.per_unit = images[:limit], labels[:limit], per_unit
        self.count = len(self.images)
        self.units = -(-self.count // per_unit)
        self.num_classes, self.class_names = 10, tuple("0123456789")
        self.fingerprint = hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def items(self, unit: int) -> Iterator[Item]:
        for i in range(unit * self.per_unit, min((unit + 1) * self.per_unit, self.count)):
            yield Item(f"digits:{i}", int(self.labels[i]), lambda i=i: self.images[i])  # type: ignore[misc]


def _refuse(why: str) -> np.ndarray:
    raise ValueError(why)
