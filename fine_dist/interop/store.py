"""Images on their way to disk: any process writes any of them in any order, and what is missing is known after a crash.

A folder with `images.u8` (count x H x W x C bytes, of full length from the start, without taking up space), `done.u8`
(one byte an image, set after its pixels are on disk) and `store.json` (sizes, and what the images are of).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_dist.errors import DataError
from fine_dist.files import write_new
from fine_dist.interop.npz import write_samples

_ABOUT, _IMAGES, _DONE = "store.json", "images.u8", "done.u8"


class ImageStore:
    """Opens a store, or makes it; any number of processes may open the same one.

    size:     height and width of an image; channels: 1 or 3.
    identity: what the images are of (model's hash, sampler, seed); JSON. `DataError` names what differs when the folder
              holds a store of something else.
    """

    def __init__(
        self, folder: str | Path, count: int, size: tuple[int, int], channels: int, identity: dict[str, Any]
    ) -> None:
        self.folder, self.count, self.shape = Path(folder), count, (*size, channels)
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"count": count, "shape": list(self.shape), **json.loads(json.dumps(identity))}
        try:
            write_new(self.folder / _ABOUT, json.dumps(about, indent=1) + "\n")
        except FileExistsError:
            self._agree(about)
        self._bytes = int(np.prod(self.shape))
        self._images = self._open(_IMAGES, count * self._bytes)
        self._done = self._open(_DONE, count)

    def _agree(self, about: dict[str, Any]) -> None:
        try:
            found = json.loads((self.folder / _ABOUT).read_text())
            differs = sorted(key for key in {*about, *found} if about.get(key) != found.get(key))
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.folder / _ABOUT} is damaged: {error}; remove the folder to begin again") from None
        if differs:
            told = "; ".join(f"{key}: {found.get(key)!r} there, {about.get(key)!r} now" for key in differs)
            raise DataError(f"{self.folder} holds other images ({told}); choose another folder, or remove it")

    def _open(self, name: str, size: int) -> int:
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(file, size)  # the same length for everybody; what is there stays
        return file

    def close(self) -> None:
        """Close its files."""
        os.close(self._images)
        os.close(self._done)

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def missing(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """The numbers of images that nobody has written, int64; process `rank`'s share of all: rank, rank + W, ..."""
        done = np.frombuffer(os.pread(self._done, self.count, 0), np.uint8)
        mine = np.arange(rank, self.count, world_size)
        return torch.from_numpy(mine[done[mine] == 0])

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Store images uint8 [B, C, H, W] under their numbers [B]; on disk when this returns."""
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.shape:
            raise DataError(
                f"{self.folder}: images are {pixels.dtype} {list(pixels.shape)}, not uint8 {list(self.shape)}"
            )
        numbers = indices.tolist()
        for number, image in zip(numbers, pixels):
            os.pwrite(self._images, image.tobytes(), number * self._bytes)
        os.fdatasync(self._images)
        for number in numbers:
            os.pwrite(self._done, b"\x01", number)
        os.fdatasync(self._done)

    def batches(self, batch: int = 256) -> Iterator[np.ndarray]:
        """All images in order, uint8 [B, H, W, C]. `DataError` while some are missing."""
        left = len(self.missing())
        if left:
            raise DataError(f"{self.folder}: {left} of {self.count} images are missing; the same command makes them")
        for start in range(0, self.count, batch):
            num = min(batch, self.count - start)
            blob = os.pread(self._images, num * self._bytes, start * self._bytes)
            yield np.frombuffer(blob, np.uint8).reshape(num, *self.shape)

    def to_npz(self, path: str | Path) -> None:
        """Write all images as ADM's sample file, a batch at a time."""
        height, width, channels = self.shape
        write_samples(path, self.batches(), count=self.count, size=(height, width), channels=channels)
