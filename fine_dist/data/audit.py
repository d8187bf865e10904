"""Reports on existing shards: verify every byte, describe the content, write a manifest for another program's tars."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fine_dist.core.errors import DataError
from fine_dist.core.files import sha256_of
from fine_dist.core.regular_files import open_regular
from fine_dist.data.manifest import Manifest, ShardInfo
from fine_dist.data.reader import NOT_FINITE, ShardSet
from fine_dist.data.settings import DataConfig
from fine_dist.data.tar_index import ShardIndex, TarError, index_tar, latent_type

_PIECE = 1024


def verify(where: str) -> tuple[Manifest, list[str]]:
    """Check shards against their manifest: sizes, sha256, structure, keys, labels, and every number.

    Args:
        where: Folder or URL of the shards.

    Returns:
        The manifest, and a list of problems, each with its shard and key. The list is empty if the shards are intact.
    """
    shard_set = ShardSet(where, DataConfig(verify="sha256"))
    manifest = shard_set.manifest
    problems: list[str] = []
    keys: dict[str, str] = {}
    for number, info in enumerate(manifest.shards):
        shard = shard_set.shard(number).ready()
        if shard.fault:
            problems.append(f"{info.name}: {shard.fault}")
            continue
        try:
            with open(shard.fd, "rb", buffering=1 << 18, closefd=False) as stream:
                tar_index = index_tar(
                    stream, os.fstat(shard.fd).st_size, manifest.stored_shape, manifest.dtype, manifest.num_classes
                )
        except TarError as fault:
            problems.append(f"{info.name}: {fault}")
            continue
        for index, fault_text in tar_index.faults.items():
            problems.append(f"{info.name}: {tar_index.keys[index]}: {fault_text}")
        for key in tar_index.keys:
            if keys.setdefault(key, info.name) != info.name:
                problems.append(f"{info.name}: {key}: this key is also in {keys[key]}")
        if len(tar_index.keys) != info.count:
            problems.append(f"{info.name}: the manifest says {info.count} samples; it has {len(tar_index.keys)}")
            continue
        for start in range(0, info.count, _PIECE):
            index_N = np.arange(start, min(start + _PIECE, info.count))
            rows = shard_set.read(np.full(len(index_N), number), index_N, tokens=manifest.tokens is not None)
            for row, text in rows.faults.items():
                if int(index_N[row]) not in tar_index.faults:
                    problems.append(f"{info.name}: {shard.key(int(index_N[row]))}: {text}")
        # Closed after each shard, because thousands of shards cannot all be open.
        shard_set.keep_open(set(), [])
    shard_set.close()
    return manifest, problems


@dataclass(frozen=True)
class Summary:
    """A description of shards. `mean` and `std` are those of the unscaled latents (for moments, of samples drawn from
    them), over all channels."""

    manifest: Manifest
    base: str
    histogram: np.ndarray
    """Number of samples of each class, int64 [num_classes]."""
    mean: float
    std: float
    channel_mean: np.ndarray
    channel_std: np.ndarray
    bytes: int

    @property
    def scaled_std(self) -> float:
        """Standard deviation of the scaled latents that models are trained on, near 1 with the right scaling factor."""
        if self.manifest.channel_scale:
            return float(np.sqrt(np.square(self.channel_std * self.manifest.channel_scale).mean()))
        return self.std * self.manifest.scaling_factor

    @property
    def warnings(self) -> list[str]:
        """Sentences about likely mistakes: scaling factors, and classes without samples."""
        sentences = []
        factor = self.manifest.scaling_factor
        unscaled = factor == 1 and not self.manifest.channel_scale and self.manifest.codec != "identity"
        if factor != 1 and 0.5 < self.std < 2 and not 0.5 < self.scaled_std < 2:
            sentences.append(
                f"the stored latents have standard deviation {self.std:.3g}, and {self.scaled_std:.3g} scaled by "
                f"{factor:g}: the scaling factor seems to be applied twice (store unscaled latents)"
            )
        elif factor != 1 and not 0.4 < self.scaled_std < 2.5:
            sentences.append(
                f"scaled by {factor:g}, the latents have standard deviation {self.scaled_std:.3g}, far from 1: "
                "is this the factor of their VAE?"
            )
        elif unscaled and not 0.4 < self.std < 2.5:
            sentences.append(
                f"the scaling factor is 1 but the latents have standard deviation {self.std:.3g}: "
                f"it seems not to be applied at all (a factor near {1 / max(self.std, 1e-9):.3g} would give 1)"
            )
        empty = int((self.histogram == 0).sum())
        if empty:
            sentences.append(f"{empty} of {len(self.histogram)} classes have no sample")
        return sentences


def inspect(where: str) -> Summary:
    """Read all shards once and describe them. `DataError` when a sample is damaged."""
    shard_set = ShardSet(where, DataConfig())
    manifest = shard_set.manifest
    channels = manifest.latent_shape[0]
    histogram = np.zeros(manifest.num_classes, np.int64)
    total_C, square_C, numbers = np.zeros(channels), np.zeros(channels), 0
    for number, index_N in _pieces(manifest):
        rows = shard_set.read(np.full(len(index_N), number), index_N)
        for row, fault in rows.faults.items():
            shard_set.count_bad(number, int(index_N[row]), fault)
        histogram += np.bincount(rows.labels, minlength=manifest.num_classes)
        values = rows.latents[:, :channels].double()
        total_C += values.sum((0, 2, 3)).numpy()
        square_C += values.square().sum((0, 2, 3)).numpy()
        if manifest.kind == "moments":
            square_C += rows.latents[:, channels:].double().square().sum((0, 2, 3)).numpy()
        numbers += values[:, 0].numel()
        if index_N[-1] == manifest.shards[number].count - 1:
            shard_set.keep_open(set(), [])
    shard_set.close()
    mean_C, square_mean_C = total_C / numbers, square_C / numbers
    mean = float(mean_C.mean())
    return Summary(
        manifest=manifest,
        base=shard_set.base,
        histogram=histogram,
        mean=mean,
        std=math.sqrt(max(0.0, float(square_mean_C.mean()) - mean**2)),
        channel_mean=mean_C,
        channel_std=np.sqrt(np.maximum(square_mean_C - mean_C**2, 0)),
        bytes=sum(info.bytes for info in manifest.shards),
    )


def _not_finite(stream: BinaryIO, shard_index: ShardIndex, shape: tuple[int, ...], dtype: str) -> dict[int, str]:
    """The error of each sample with NaN or Inf that has no other error, by number."""
    kind, count = np.dtype(dtype), math.prod(shape)
    faults = {}
    for number, offset in enumerate(shard_index.offsets.tolist()):
        if number in shard_index.faults or kind.kind != "f":
            continue
        stream.seek(offset)
        if not np.isfinite(np.frombuffer(stream.read(count * kind.itemsize), kind)).all():
            faults[number] = NOT_FINITE
    return faults


def _pieces(manifest: Manifest) -> Iterator[tuple[int, np.ndarray]]:
    for number, info in enumerate(manifest.shards):
        for start in range(0, info.count, _PIECE):
            yield number, np.arange(start, min(start + _PIECE, info.count))


def index_folder(
    folder: str | Path, *, num_classes: int | None, scaling_factor: float | None, kind: str, codec: str = "unknown"
) -> Manifest:
    """Write manifest.json into a folder of another program's tars (`KEY.latent.npy`, `KEY.cls`), which are not changed.

    Args:
        folder: Folder of the tars.
        num_classes: Number of classes. None: the largest label plus 1.
        scaling_factor: Factor that the stream multiplies latents by. None: 1.
        kind: `sample` or `moments`, the form of the stored latents.
        codec: Name of the codec that made the latents.

    Raises:
        DataError: There are no tars, or samples are damaged (each is named by its shard and key).
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder}: no .tar files")
    want: tuple[tuple[int, ...], str] | None = None
    infos, largest, problems = [], -1, []
    for path in tars:
        size = path.stat().st_size
        try:
            with open_regular(path) as stream:
                want = want or latent_type(stream, size)
                shape, dtype = want or (None, None)
                shard_index = index_tar(stream, size, shape, dtype, num_classes)
                if want:
                    shard_index.faults.update(_not_finite(stream, shard_index, *want))
        except TarError as fault:
            problems.append(f"{path.name}: {fault}")
            continue
        problems += [f"{path.name}: {shard_index.keys[i]}: {text}" for i, text in shard_index.faults.items()]
        largest = max(largest, int(shard_index.labels.max(initial=-1)))
        infos.append(ShardInfo(name=path.name, count=len(shard_index.keys), bytes=size, sha256=sha256_of(path)))
    if problems or want is None:
        listed = "\n  ".join(problems[:10]) or "no latents in any tar"
        raise DataError(f"{folder}: no manifest written; {len(problems)} problems:\n  {listed}")
    shape, dtype = want
    if len(shape) != 3 or dtype not in ("float16", "float32") or (kind == "moments" and shape[0] % 2):
        raise DataError(f"{folder}: latents are {dtype} {shape}; three dimensions in float16 or float32 are needed")
    manifest = Manifest(
        count=sum(info.count for info in infos),
        latent_shape=(shape[0] // (2 if kind == "moments" else 1), shape[1], shape[2]),
        kind=kind,
        dtype=dtype,
        scaling_factor=1.0 if scaling_factor is None else scaling_factor,
        num_classes=num_classes or largest + 1,
        codec=codec,
        shards=tuple(infos),
    )
    manifest.save(folder)
    return manifest
