"""Stores of images and latents on disk, which any number of processes fill in any order and complete after a crash.

A store is a folder with `images.u8` or `latents.f4` (a sparse file of full length from the start), `done.u8` (one byte
an image, set after its data are on disk) and `store.json` (sizes, and what the images are of).
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

_ABOUT, _DONE = "store.json", "done.u8"


class ArrayStore:
    """A store of arrays of one shape, opened or created; any number of processes may open the same one.

    Args:
        folder: The store's folder.
        count: Number of arrays.
        shape: Shape of one array, as it lies in the file.
        identity: What the arrays are of (the model's hash, sampler, seed); JSON.

    Raises:
        DataError: The folder holds a store of something else; the message names what differs.
    """

    file: ClassVar[str]
    dtype: ClassVar[str]
    what: ClassVar[str]

    def __init__(self, folder: str | Path, count: int, shape: tuple[int, ...], identity: dict[str, Any]) -> None:
        self.folder, self.count, self.shape = Path(folder), count, shape
        self.folder.mkdir(parents=True, exist_ok=True)
        description = {"count": count, "shape": list(self.shape), **json.loads(json.dumps(identity))}
        try:
            # Exactly one process writes the file; all others compare with it.
            write_new(self.folder / _ABOUT, json.dumps(description, indent=1) + "\n")
        except FileExistsError:
            self._check_description(description)
        self._bytes = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        self._rows = self._open(self.file, count * self._bytes)
        self._done = self._open(_DONE, count)

    def _check_description(self, description: dict[str, Any]) -> None:
        path, remedy = self.folder / _ABOUT, "remove the folder to begin again"
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
        os.ftruncate(file, size)  # the same length for everybody; what is there stays
        return file

    def close(self) -> None:
        """Close its files."""
        os.close(self._rows)
        os.close(self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def missing(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """Numbers int64 of the arrays that no process has written, of process `rank`'s share: rank, rank + W, ..."""
        # Read from the file at each call: other processes may have written since.
        done = np.frombuffer(os.pread(self._done, self.count, 0), np.uint8)
        share = np.arange(rank, self.count, world_size)
        return torch.from_numpy(share[done[share] == 0])

    def _write(self, indices: Tensor, rows: np.ndarray) -> None:
        """Store rows [B, *shape] under their numbers [B]; on disk when this returns."""
        if rows.dtype != np.dtype(self.dtype) or rows.shape[1:] != self.shape:
            raise DataError(
                f"{self.folder}: {self.what} are {rows.dtype} {list(rows.shape)}, not {np.dtype(self.dtype)} "
                f"{list(self.shape)}"
            )
        numbers = indices.tolist()
        # The mark is written after the data have reached the disk: a crash in between loses marks, never marked data.
        for number, row in zip(numbers, rows):
            # Positioned writes: processes share the file without sharing a file position.
            os.pwrite(self._rows, row.tobytes(), number * self._bytes)
        os.fdatasync(self._rows)
        for number in numbers:
            os.pwrite(self._done, b"\x01", number)
        os.fdatasync(self._done)

    def batches(self, batch: int = 256) -> Iterator[np.ndarray]:
        """All of them in order, [B, *shape]. `DataError` while some are missing."""
        left = len(self.missing())
        if left:
            raise DataError(
                f"{self.folder}: {left} of {self.count} {self.what} are missing; the same command makes them"
            )
        for start in range(0, self.count, batch):
            yield self.read(start, min(batch, self.count - start))

    def read(self, start: int, num: int) -> np.ndarray:
        """[num, *shape] from number `start` on, as they are in the file now."""
        blob = os.pread(self._rows, num * self._bytes, start * self._bytes)
        return np.frombuffer(blob, self.dtype).reshape(num, *self.shape)


class ImageStore(ArrayStore):
    """Images, uint8 [H, W, C].

    size: height and width of an image; channels: 1 or 3. identity: as `ArrayStore`.
    """

    file, dtype, what = "images.u8", "u1", "images"

    def __init__(
        self, folder: str | Path, count: int, size: tuple[int, int], channels: int, identity: dict[str, Any]
    ) -> None:
        super().__init__(folder, count, (*size, channels), identity)

    def write(self, indices: Tensor, images: Tensor) -> None:
        """Store images uint8 [B, C, H, W] under their numbers [B]; on disk when this returns."""
        self._write(indices, images.permute(0, 2, 3, 1).contiguous().numpy())

    def to_npz(self, path: str | Path) -> None:
        """Write all images as ADM's sample file, a batch at a time."""
        height, width, channels = self.shape
        write_samples(path, self.batches(), count=self.count, size=(height, width), channels=channels)


class LatentStore(ArrayStore):
    """Latents, float32 [C, h, w]."""

    file, dtype, what = "latents.f4", "<f4", "latents"

    def write(self, indices: Tensor, latents: Tensor) -> None:
        """Store latents float32 [B, C, h, w] under their numbers [B]; on disk when this returns."""
        self._write(indices, latents.contiguous().numpy())

    def to_npy(self, path: str | Path) -> None:
        """Write all latents as one `.npy`, a batch at a time and atomically."""
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
