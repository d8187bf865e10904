"""Small shards whose samples can be told apart: sample i is filled with the number i, its label is i % num_classes."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from fine_dist.core.files import sha256_of
from fine_dist.data.manifest import Manifest, ShardInfo
from fine_dist.data.settings import DataConfig
from fine_dist.data.shards import ShardWriter
from fine_dist.data.stream import Batch, LatentStream

SHAPE = (1, 4, 4)
NUM_CLASSES = 10
UNEVEN = (7, 31, 1, 50, 12, 29, 64, 3, 18, 5)


def make(folder: Path, counts: Iterable[int] = UNEVEN, **fields: Any) -> Manifest:
    """Shards of these sizes, written by ShardWriter; float16 holds every number up to 2048."""
    infos, number = [], 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder, shard, SHAPE) as writer:
            for _ in range(count):
                writer.add(np.full(SHAPE, number), number % NUM_CLASSES)
                number += 1
        infos.append(writer.info)
    manifest = Manifest(count=number, latent_shape=SHAPE, num_classes=NUM_CLASSES, shards=tuple(infos), **fields)
    manifest.save(folder)
    return manifest


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """A webdataset sample; a change to None leaves the entry out (write `latent_npy` for latent.npy)."""
    entries = {
        "__key__": f"sample{number:04d}",
        "cls": str(number % NUM_CLASSES).encode(),
        "latent.npy": npy(np.full(SHAPE, number, np.float16)),
    }
    entries.update({key.replace("_npy", ".npy"): value for key, value in changes.items()})
    return {key: value for key, value in entries.items() if value is not None}


def make_foreign(folder: Path, shards: list[list[dict[str, Any]]], manifest: bool = True) -> None:
    """Tars written by webdataset with its default settings, and a manifest that promises a sample per key."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number, samples in enumerate(shards):
        path = folder / f"other-{number}.tar"
        with wds.TarWriter(str(path), encoder=False) as tar:
            for each in samples:
                tar.write(each)
        infos.append(ShardInfo(name=path.name, count=len(samples), bytes=path.stat().st_size, sha256=sha256_of(path)))
    if manifest:
        total = sum(info.count for info in infos)
        Manifest(count=total, latent_shape=SHAPE, num_classes=NUM_CLASSES, shards=tuple(infos)).save(folder)


def stream(folder: Path | str, **fields: Any) -> LatentStream:
    """A stream with small settings; `fields` are LatentStream's, or DataConfig's."""
    own = {key: fields.pop(key) for key in ("seed", "global_batch", "rank", "world_size", "expect") if key in fields}
    config = DataConfig(**{"shards": str(folder), "streams": 4, "window": 40, **fields})
    return LatentStream(config, **{"seed": 3, "global_batch": 12, **own})


def take(source: LatentStream, count: int, start: int = 0) -> list[Batch]:
    batches = source.batches(start)
    with source:
        return [next(batches) for _ in range(count)]


def numbers(batches: list[Batch]) -> torch.Tensor:
    """Which samples are in batches, [steps, B]; checks on the way that latents are whole and labels are theirs."""
    latents = torch.stack([batch.latents for batch in batches])
    found = latents.flatten(2)[..., 0].long()
    assert (latents.flatten(2) == found[..., None]).all()
    assert torch.equal(torch.stack([batch.labels for batch in batches]), found % NUM_CLASSES)
    return found
