"""Latent shards on disk: plain webdataset tars, written with their `manifest.json`.

A sample is `KEY.cls` (the label, decimal text) and `KEY.latent.npy` (float16 or float32, unscaled), so that any
webdataset user can read a shard.

Shapes: N samples, C channels, H and W sides of a latent; E width, h and w sides of an image encoder's tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fine_dist.core.errors import DataError
from fine_dist.core.temp_files import open_temp_file
from fine_dist.data.manifest import SHARD_NAME, Manifest, ShardInfo
from fine_dist.data.records import (
    LABEL,
    LABEL_DIGITS,
    LATENT,
    TOKENS,
    layout_of,
    npy_bytes,
    record_key,
    shard_prefix,
    tar_writer,
)


class ShardWriter:
    """Writes one shard, which gets its final name only when it is complete.

        with ShardWriter(folder, number=3, shape=(4, 32, 32)) as shard:
            shard.add(latent, label)          # [C, H, W] array, int
        shard.info                            # ShardInfo, once closed

    When the `with` block raises, the unfinished file is removed.

    Raises:
        DataError: A latent has another shape, or is not finite in the stored dtype.
    """

    def __init__(
        self,
        folder: str | Path,
        number: int,
        shape: tuple[int, ...],
        dtype: str = "float16",
        tokens: tuple[tuple[int, ...], str] | None = None,
    ) -> None:
        self.path = Path(folder) / SHARD_NAME.format(number)
        self.prefix = shard_prefix(number)
        self.layout = layout_of(tuple(shape), dtype, tokens)
        self.count = 0
        self.info: ShardInfo | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = open_temp_file(self.path)
        self._part = Path(draft.name)
        self._stream = _Hashing(draft)
        self._tar = tar_writer(self._stream)

    def add(self, latent: np.ndarray, label: int, tokens: np.ndarray | None = None) -> str:
        """Append a sample and return its key.

        Args:
            latent: [C, H, W].
            label: Its class.
            tokens: [E, h, w] of the image, in a shard that holds them.
        """
        key = record_key(self.prefix, self.count)
        if tuple(latent.shape) != self.layout.shape:
            raise DataError(f"{self.path}: {key}: latent of shape {tuple(latent.shape)}, not {self.layout.shape}")
        if not 0 <= label < 10**LABEL_DIGITS:
            raise DataError(f"{self.path}: {key}: label {label} is not in 0 .. {10**LABEL_DIGITS - 1}")
        entries = {LATENT: self._stored(key, "latent", latent, self.layout.dtype)}
        if self.layout.tokens is not None:
            if tokens is None or tuple(tokens.shape) != self.layout.tokens.shape:
                shape = None if tokens is None else tuple(tokens.shape)
                raise DataError(f"{self.path}: {key}: tokens of shape {shape}, not {self.layout.tokens.shape}")
            entries[TOKENS] = self._stored(key, "image's tokens", tokens, self.layout.tokens.dtype)
        self._tar.write({"__key__": key, LABEL: str(int(label)).encode(), **entries})
        self.count += 1
        return key

    def _stored(self, key: str, what: str, numbers: np.ndarray, dtype: np.dtype) -> bytes:
        """Numbers as the bytes of their entry. `DataError` when they are not finite in the stored dtype."""
        # A float16 overflow gives Inf, which the next line names with its key; NumPy's warning would not.
        with np.errstate(over="ignore"):
            stored = np.asarray(numbers).astype(dtype)
        if not np.isfinite(stored).all():
            plural = "have" if what.endswith("tokens") else "has"
            raise DataError(f"{self.path}: {key}: the {what} {plural} NaN or Inf as {dtype}")
        return npy_bytes(stored)

    def close(self) -> ShardInfo:
        """Finish the file and rename it to its final name."""
        self._tar.close()
        self._stream.flush()
        # Before the rename: once the shard has its name, its marks say that it is done.
        os.fsync(self._stream.fileno())
        os.replace(self._part, self.path)
        self._stream.close()
        self.info = ShardInfo(
            name=self.path.name,
            count=self.count,
            bytes=self._stream.size,
            sha256=self._stream.sha256.hexdigest(),
            key_prefix=self.prefix,
        )
        return self.info

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self._part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk, perhaps; there is nothing left to lose
            self._tar.close()
            self._stream.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class _Hashing(io.BufferedWriter):
    """A file that is written sequentially and keeps count of its size and sha256."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file, 1 << 20)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        # Hashed while it is written: reading 100 GB again for their
        # hashes would take as long as encoding on some disks.
        self.sha256.update(data)
        self.size += len(data)
        return super().write(data)


def write_shards(
    folder: str | Path,
    latents: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    shard_samples: int = 1024,
    dtype: str = "float16",
    **fields: Any,
) -> Manifest:
    """Write arrays as shards with their manifest, for small data sets and tests; use `encode` for large ones.

    Args:
        folder: Folder of the shards.
        latents: [N, C, H, W], unscaled.
        labels: Integers [N].
        num_classes: Number of classes.
        shard_samples: Samples of a shard.
        dtype: Data type of the stored numbers.
        fields: Further fields of the manifest (`scaling_factor`, `codec`, `class_names`, ...).
    """
    shape = tuple(latents.shape[1:])
    infos = []
    for number, start in enumerate(range(0, len(latents), shard_samples)):
        with ShardWriter(folder, number, shape, dtype) as writer:
            for latent, label in zip(latents[start : start + shard_samples], labels[start : start + shard_samples]):
                writer.add(latent, int(label))
        if writer.info is not None:
            infos.append(writer.info)
    channels = shape[0] // (2 if fields.get("kind") == "moments" else 1)
    manifest = Manifest(
        count=len(latents),
        latent_shape=(channels, *shape[1:]),
        dtype=dtype,
        num_classes=num_classes,
        shards=tuple(infos),
        **fields,
    )
    manifest.save(folder)
    return manifest
