"""Images to measure: a folder of pictures, a tar of them, or ADM's `.npz`; all of one size, read in batches.

Arrays are uint8 [B, C, H, W]. The number of an image is its index in the sorted list of files (in a tar or `.npz`, its
index in the file). Images are read as in `encode`: transparent images get a background color, and 16-bit images are
scaled to 8 bits.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fine_dist.core.config import expand_path
from fine_dist.core.errors import DataError
from fine_dist.core.regular_files import check_regular, open_regular
from fine_dist.data.image_decoding import FORMATS, SUFFIXES, WHITE, Color, to_rgb
from fine_dist.sampling.npz import NpzImages


class Images(Protocol):
    """A numbered set of images."""

    @property
    def count(self) -> int: ...

    def batches(self, batch: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers [B] int64 and images uint8 [B, 3, H, W] of those numbered start..stop-1."""


def is_picture(path: Path) -> bool:
    """Whether a path has the suffix of an image and is not hidden, such as macOS's `._` files."""
    return path.suffix.lower().lstrip(".") in SUFFIXES and not path.name.startswith(".")


def open_images(path: str | Path, background: Color = WHITE) -> Images:
    """The images at a path.

    Args:
        path: A folder of images, a `.tar` or an `.npz`.
        background: Background color of transparent images.

    Raises:
        DataError: There are no images, or the path is none of these.
    """
    path = Path(expand_path(str(path)))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if is_picture(p) and p.is_file())
        return Pictures(str(path), [(str(p.relative_to(path)), p.read_bytes) for p in files], background)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder of images")
    if path.suffix == ".npz":
        return _Npz(path)
    if path.suffix == ".tar":
        return _tar(path, background)
    raise DataError(f"{path}: images come as a folder of pictures, a .tar of them, or ADM's .npz")


class Pictures:
    """Encoded images as (name, function that reads the bytes)."""

    def __init__(self, where: str, files: list[tuple[str, Callable[[], bytes]]], background: Color = WHITE) -> None:
        if not files:
            raise DataError(f"{where} holds no images; looked for {', '.join(SUFFIXES)}")
        self.where, self.files, self.background = where, files, background
        self.count = len(files)

    def batches(self, batch: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        stop = self.count if stop is None else min(stop, self.count)
        first = self._decode(0).shape
        for begin in range(start, stop, batch):
            numbers = range(begin, min(begin + batch, stop))
            images = []
            for i in numbers:
                image = self._decode(i)
                if image.shape != first:
                    raise DataError(
                        f"{self.where}: {self.files[i][0]} is {image.shape[1]}x{image.shape[0]}, and "
                        f"{self.files[0][0]} is {first[1]}x{first[0]}; bring all to one size first (a distance over "
                        "mixed sizes would measure the resizing)"
                    )
                images.append(image)
            yield torch.tensor(list(numbers)), torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def _decode(self, number: int) -> np.ndarray:
        """uint8 [H, W, 3]. `DataError` for what cannot be read."""
        name, read = self.files[number]
        try:
            with Image.open(io.BytesIO(read()), formats=[*FORMATS]) as image:
                return np.asarray(to_rgb(ImageOps.exif_transpose(image), self.background))
        except Exception as error:  # decoders raise whatever they like
            first = str(error).partition(chr(10))[0][:200]
            raise DataError(f"{self.where}: {name} cannot be read: {first}") from None


class _Npz:
    def __init__(self, path: Path) -> None:
        self.source = NpzImages(path)
        self.count = self.source.count

    def batches(self, batch: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        stop = self.count if stop is None else min(stop, self.count)
        begin = 0
        for images in self.source.batches(batch):
            low, high = max(start, begin), min(stop, begin + len(images))
            if low < high:
                part = torch.from_numpy(images[low - begin : high - begin].copy()).permute(0, 3, 1, 2)
                yield torch.arange(low, high), part.expand(-1, 3, -1, -1)
            begin += len(images)
            if begin >= stop:
                return


def _tar(path: Path, background: Color) -> Pictures:
    """The images of a tar, which are read by their offsets without unpacking the file."""
    files: list[tuple[str, Callable[[], bytes]]] = []

    def reader(offset: int, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            with open_regular(path) as stream:
                stream.seek(offset)
                return stream.read(size)

        return read

    check_regular(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and is_picture(Path(member.name)):
                    files.append((member.name, reader(member.offset_data, member.size)))
    except tarfile.TarError as error:
        raise DataError(f"{path} is no tar, or a damaged one: {error}") from None
    return Pictures(str(path), files, background)
