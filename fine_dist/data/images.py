"""Sources of images to encode: class folders and webdataset shards, divided into units of one shard each.

Shapes: images are uint8 [3, H, W], the image size; those of `small_images.py` have one channel.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset as wds

from fine_dist.core.config import expand_path
from fine_dist.core.errors import DataError
from fine_dist.data.image_decoding import SUFFIXES, WHITE, Color, read_image
from fine_dist.data.records import LABEL_DIGITS
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import copy, expand_braces, is_remote, local_path
from fine_dist.model.arch import Sides

ONE_CLASS = ("all",)
"""The class of a folder of images without class folders."""
_ORDER = 0x696D61676573
"""Random stream of the order of images, different from other uses of the seed."""


@dataclass(frozen=True)
class ImageItem:
    """One image of a unit: its origin, its label, and a function that reads it (and may raise any exception)."""

    source: str
    label: int
    read: Callable[[], np.ndarray]


class ImageSource(Protocol):
    """Images in units. A unit holds the same images in the same order in every process."""

    @property
    def units(self) -> int:
        """Number of units; each becomes a shard."""

    @property
    def count(self) -> int | None:
        """Number of images, if it is known in advance."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, if it is known in advance."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of labels, if they are known."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of files and folders that are neither images nor classes."""

    @property
    def fingerprint(self) -> str:
        """A hash of the list of images."""

    def items(self, unit: int) -> Iterator[ImageItem]:
        """The images of a unit."""


class FolderImages:
    """ImageNet's layout: one sub-folder of images per class; a label is its sub-folder's rank in sorted order.

    The images are shuffled once, by the seed, so that every shard holds many classes. Damaged images are detected when
    they are read. Hidden files and folders (`.ipynb_checkpoints`, macOS's `._x.jpg`), and everything else that is
    neither an image nor the folder of a class, are listed in `left_out`. Links are followed. A folder of images without
    sub-folders is one class, `all`.

    Args:
        root: folder of class folders.
        image_size: side of the square crop in pixels, or its height and width.
        per_unit: images of a unit, which becomes a shard.
        seed: seed of the order.
        limit: number of images, at most.
        background: color under transparent images.
        part: "train" or "held_out" of `fraction`; None: all images.
        fraction: fraction of each class's images that is the part "held_out": every n-th, at least one of two.

    Raises:
        DataError: there are no sub-folders or no images.
    """

    def __init__(
        self,
        root: str,
        *,
        image_size: Sides,
        per_unit: int,
        seed: int,
        limit: int | None = None,
        background: Color = WHITE,
        part: str | None = None,
        fraction: float = 0.1,
    ) -> None:
        self.root, self.image_size, self.per_unit = Path(expand_path(root)), image_size, per_unit
        self.background = background
        self.class_names = class_folders(root) or ONE_CLASS
        entries = sorted(os.scandir(self.root), key=lambda entry: entry.name)
        flat = self.class_names == ONE_CLASS and not (self.root / ONE_CLASS[0]).is_dir()
        files, left_out = [], []
        if not flat:
            left_out = [entry.name + "/" * entry.is_dir() for entry in entries if not _is_class(entry)]
        for label, name in enumerate(self.class_names):
            class_files, within = [], "" if flat else f"{name}/"
            for entry in sorted(os.scandir(self.root / within), key=lambda entry: entry.name):
                if _is_image(entry):
                    class_files.append((f"{within}{entry.name}", label))
                else:
                    left_out.append(f"{within}{entry.name}" + "/" * entry.is_dir())
            files += class_files if part is None else _part_of(class_files, part, fraction)
        self.left_out = tuple(left_out)
        if not files:
            raise DataError(
                f"source: {self.root} has no images, neither directly nor in one sub-folder per class; kinds: "
                + ", ".join(SUFFIXES)
                + (f"; {describe_left_out(self.left_out)}" if left_out else "")
            )
        # Sorted before the seeded shuffle, because file systems list folders in different orders.
        order = np.random.default_rng([seed, _ORDER]).permutation(len(files))[:limit]
        self.files = [files[i] for i in order]
        self.count = len(self.files)
        self.units = -(-self.count // per_unit)
        self.num_classes = len(self.class_names)
        self.fingerprint = hashlib.sha256("\n".join(name for name, _ in self.files).encode()).hexdigest()

    def items(self, unit: int) -> Iterator[ImageItem]:
        for name, label in self.files[unit * self.per_unit : (unit + 1) * self.per_unit]:
            yield ImageItem(name, label, lambda name=name: self._read(name))  # type: ignore[misc]

    def _read(self, name: str) -> np.ndarray:
        return read_image(self.root / name, self.image_size, self.background)


def class_folders(root: str) -> tuple[str, ...]:
    """Names of the class folders in a folder, in the order of labels. `DataError` when there is no such folder."""
    folder = Path(expand_path(root))
    if not folder.is_dir():
        raise DataError(f"source: {folder}: there is no such folder")
    return tuple(sorted(entry.name for entry in os.scandir(folder) if _is_class(entry)))


def _is_class(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _is_image(entry: os.DirEntry[str]) -> bool:
    name = entry.name
    # `is_file` follows links and is False for FIFOs and sockets, whose reading would block.
    return not name.startswith(".") and name.rpartition(".")[2].lower() in SUFFIXES and entry.is_file()


def _part_of(files: list[tuple[str, int]], part: str, fraction: float) -> list[tuple[str, int]]:
    """One part of a class's images: every n-th is held out, or the last one of fewer than n but more than one."""
    # By position in the sorted names and not at random, so that adding a class does not change the split of others.
    every = max(2, round(1 / fraction))
    last = len(files) - 1 if 1 < len(files) < every else -1
    held_out = {number for number in range(len(files)) if number % every == every - 1 or number == last}
    return [file for number, file in enumerate(files) if (number in held_out) == (part == "held_out")]


class TarImages:
    """webdataset image shards (`KEY.jpg`, `KEY.cls`). Each becomes one latent shard with samples in the same order.

    Args:
        pattern: Paths or URLs of .tar files, with braces.
        image_size: Side of the square crop, in pixels.
        data: Retries and time limits of remote reads.
        num_classes: Number of classes. None: the largest label plus one.
        limit: Maximum number of images.
        background: Color under transparent parts.
    """

    def __init__(
        self,
        pattern: str,
        *,
        image_size: Sides,
        data: DataConfig,
        num_classes: int | None,
        limit: int | None = None,
        background: Color = WHITE,
    ) -> None:
        self.urls = [url if is_remote(url) else local_path(url) for url in expand_braces(pattern)]
        missing = [url for url in self.urls if not is_remote(url) and not os.path.isfile(url)]
        if missing:
            raise DataError(f"source: {missing[0]}: there is no such file ({len(missing)} of {len(self.urls)} missing)")
        self.image_size, self.num_classes, self._data = image_size, num_classes, data
        self.background = background
        self.left_out: tuple[str, ...] = ()
        self.units, self.count = len(self.urls), None
        self.class_names: tuple[str, ...] = ()
        self.limit = limit if limit is None else -(-limit // self.units)
        self.fingerprint = hashlib.sha256("\n".join(self.urls).encode()).hexdigest()

    def items(self, unit: int) -> Iterator[ImageItem]:
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

    def _samples(self, path: str, url: str) -> Iterator[ImageItem]:
        broken: list[str] = []

        def stop(error: Exception) -> bool:
            # webdataset's handler decides whether to continue; False ends
            # the shard, and the error becomes an entry of the manifest.
            broken.append(str(error).partition(" @ ")[0])
            return False

        samples = wds.WebDataset(
            [path], shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False, handler=stop
        )
        name = url.rsplit("/", 1)[-1]
        for sample in samples:
            yield self._item(f"{name}:{sample['__key__']}", sample)
        if broken:
            yield ImageItem(name, 0, lambda: _refuse(f"the tar is damaged: {broken[0]}"))

    def _item(self, source: str, sample: dict[str, Any]) -> ImageItem:
        content = next((sample[kind] for kind in sample if kind.rpartition(".")[2].lower() in SUFFIXES), None)
        label = sample.get("cls", b"").strip()
        if content is None:
            return ImageItem(source, 0, lambda: _refuse("it has no image"))
        if not label.isdigit() or len(label) > LABEL_DIGITS:
            return ImageItem(source, 0, lambda: _refuse(f"its label is {label[:20]!r}, not a whole number"))
        if self.num_classes is not None and int(label) >= self.num_classes:
            return ImageItem(source, 0, lambda: _refuse(f"label {int(label)}, but num_classes is {self.num_classes}"))
        return ImageItem(source, int(label), lambda: self._read(content))

    def _read(self, content: bytes) -> np.ndarray:
        return read_image(io.BytesIO(content), self.image_size, self.background)


class ChosenClasses:
    """Some classes of another source, renumbered so that the first one given becomes label 0. Units stay the same.

    Raises:
        DataError: The source lacks a class, a class is given twice, or there are no images.
    """

    def __init__(self, source: ImageSource, classes: Sequence[int]) -> None:
        self.source, self.new_labels = source, {label: number for number, label in enumerate(classes)}
        if len(self.new_labels) < len(classes):
            raise DataError(f"classes: {list(classes)} names one twice")
        known = source.num_classes
        beyond = [label for label in classes if label < 0 or (known is not None and label >= known)]
        if beyond:
            legal = "0 or more" if known is None else f"0 to {known - 1}"
            raise DataError(f"classes: there is no class {beyond[0]}; legal: {legal}")
        self.units, self.left_out, self.num_classes = source.units, source.left_out, len(classes)
        names = source.class_names
        self.class_names = tuple(names[label] for label in classes) if names else ()
        self.count = None if source.count is None else sum(1 for unit in range(self.units) for _ in self.items(unit))
        if self.count == 0:
            raise DataError(f"classes: {list(classes)} have no images here")
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {list(classes)}".encode()).hexdigest()

    def items(self, unit: int) -> Iterator[ImageItem]:
        for item in self.source.items(unit):
            if item.label in self.new_labels:
                yield replace(item, label=self.new_labels[item.label])


def describe_left_out(names: Sequence[str], count: int | None = None) -> str:
    """One line such as `3 files left out (no images): a.txt, b/c.json, b/d`.

    Args:
        count: how many there are, when `names` holds only the first of them.
    """
    count = len(names) if count is None else count
    more = ", ..." if count > min(len(names), 5) else ""
    return f"{count:,} {'files' if count != 1 else 'file'} left out (no images): {', '.join(names[:5])}{more}"


def _refuse(why: str) -> np.ndarray:
    raise ValueError(why)
