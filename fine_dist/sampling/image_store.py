"""Arrays of images and latents on disk, which any number of processes write in any order, and complete after a crash.

A store is a folder with `images.u8` or `latents.f4` (a sparse file that has its full length from the start), `done.u8`
(one byte per image, set after the image's data are on disk) and `store.json` (sizes and identity).

Shapes: B images of a batch, C channels, H, W height and width of an image, h, w of a latent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from fine_dist.core.errors import DataError
from fine_dist.core.files import sync_file, write_new
from fine_dist.core.json_files import as_record, read_json
from fine_dist.core.temp_files import temp_path
from fine_dist.sampling.npz import write_samples

_DESCRIPTION, _DONE = "store.json", "done.u8"


class ArrayStore:
    """Opens or creates a store of arrays of one shape. Any number of processes may open the same store.

    Args:
        folder: Folder of the store.
        count: Number of arrays.
        shape: Shape of one array in the file.
        identity: Everything that determines the arrays' values (hash of the model, sampler, seed); JSON.

    Raises:
        DataError: The folder holds a store of another size or identity; the message names the differences.
    """

    file: ClassVar[str]
    """Name of the data file."""
    dtype: ClassVar[str]
    """numpy's name of the data type."""
    what: ClassVar[str]
    """Name of the arrays in messages."""

    def __init__(self, folder: str | Path, count: int, shape: tuple[int, ...], identity: dict[str, Any]) -> None:
        self.folder, self.count, self.shape = Path(folder), count, shape
        self.folder.mkdir(parents=True, exist_ok=True)
        description = {"count": count, "shape": list(self.shape), **json.loads(json.dumps(identity))}
        try:
            # Exactly one process creates the file; the others compare their description with it.
            write_new(self.folder / _DESCRIPTION, json.dumps(description, indent=1) + "\n")
        except FileExistsError:
            self._check_description(description)
        self._bytes = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        self._rows = self._open(self.file, count * self._bytes)
        self._done = self._open(_DONE, count)

    def _check_description(self, description: dict[str, Any]) -> None:
        path, remedy = self.folder / _DESCRIPTION, "remove the folder to begin again"
        recorded = as_record(dict[str, Any], read_json(path, DataError, remedy), path, DataError, remedy)
        differs = sorted(key for key in {*description, *recorded} if description.get(key) != recorded.get(key))
        if differs:
            differences = "; ".join(
                f"{key}: {recorded.get(key)!r} there, {description.get(key)!r} now" for key in differs
            )
            raise DataError(
                f"{self.folder} holds other {self.what} ({differences}); choose another folder, or remove it"
            )

    def _open(self, name: str, size: int) -> int:
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        os.ftruncate(file, size)  # every process sets the same length; existing data stay
        return file

    def close(self) -> None:
        """Close the files."""
        os.close(self._rows)
        os.close(self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def missing(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """Return the numbers, int64, of arrays that are not written yet, among the rank's share: rank, rank + W, ..."""
        # Read from the file at each call, because other processes write it.
        done = np.frombuffer(os.pread(self._done, self.count, 0), np.uint8)
        share = np.arange(rank, self.count, world_size)
        return torch.from_numpy(share[done[share] == 0])

    def _write(self, indices: Tensor, rows: np.ndarray) -> None:
        """Write rows [B, *shape] at their numbers [B]. They are on disk when this returns."""
        if rows.dtype != np.dtype(self.dtype) or rows.shape[1:] != self.shape:
            raise DataError(
                f"{self.folder}: {self.what} are {rows.dtype} {list(rows.shape)}, not {np.dtype(self.dtype)} "
                f"{list(self.shape)}"
            )
        numbers = indices.tolist()
        # An array is marked as done after its data have reached the disk, so a crash never leaves a mark without data.
        for number, row in zip(numbers, rows):
            # Positioned writes, because the numbers of a batch need not be consecutive.
            os.pwrite(self._rows, row.tobytes(), number * self._bytes)
        os.fdatasync(self._rows)
        for number in numbers:
            os.pwrite(self._done, b"\x01", number)
        os.fdatasync(self._done)

    def batches(self, batch: int = 256) -> Iterator[np.ndarray]:
        """Yield all arrays in order, as [B, *shape]. Raises `DataError` if some are missing."""
        num_missing = len(self.missing())
        if num_missing:
            raise DataError(
                f"{self.folder}: {num_missing} of {self.count} {self.what} are missing; the same command makes them"
            )
        for start in range(0, self.count, batch):
            yield self.read(start, min(batch, self.count - start))

    def read(self, start: int, num: int) -> np.ndarray:
        """Return `num` arrays from number `start` on, [num, *shape]; arrays that are not written yet are zero."""
        blob = os.pread(self._rows, num * self._bytes, start * self._bytes)
        return np.frombuffer(blob, self.dtype).reshape(num, *self.shape)


class ImageStore(ArrayStore):
    """A store of images, uint8 [H, W, C]; `size` is (H, W), `channels` 1 or 3, other arguments as in `ArrayStore`."""

    file, dtype, what = "images.u8", "u1", "images"

    def __init__(
        self, folder: str | Path, count: int, size: tuple[int, int], channels: int, identity: dict[str, Any]
    ) -> None:
        super().__init__(folder, count, (*size, channels), identity)

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Write images uint8 [B, C, H, W] at their numbers [B]. They are on disk when this returns."""
        self._write(indices, images.permute(0, 2, 3, 1).contiguous().numpy())

    def to_npz(self, path: str | Path) -> None:
        """Write all images to a file in ADM's sample format, one batch at a time."""
        height, width, channels = self.shape
        write_samples(path, self.batches(), count=self.count, size=(height, width), channels=channels)


class LatentStore(ArrayStore):
    """A store of latents, float32 [C, h, w]."""

    file, dtype, what = "latents.f4", "<f4", "latents"

    def write(self, indices: Tensor, latents: Tensor) -> None:
        """Write latents float32 [B, C, h, w] at their numbers [B]. They are on disk when this returns."""
        self._write(indices, latents.contiguous().numpy())

    def to_npy(self, path: str | Path) -> None:
        """Write all latents to one `.npy` file [N, C, h, w], one batch at a time and atomically."""
        path = Path(path)
        draft = temp_path(path)
        try:
            with open(draft, "wb") as file:
                header = {"descr": self.dtype, "fortran_order": False, "shape": (self.count, *self.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for rows in self.batches():
                    file.write(rows.data)
            sync_file(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
