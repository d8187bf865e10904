"""`python -m benchmarks data`: the latent stream, compared with plain webdataset, one file per sample and `cat`.

Also its memory, start-up and resuming, and the speed of encoding. Latents are 4x32x32 in float16 and in the page cache;
one process reads them, without reader threads unless a row says so. The stream returns latents as the shards store
them, while webdataset and single files give float32, so those are compared with the stream plus that conversion.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from benchmarks.encoding import encoding
from benchmarks.rows import BenchmarkRow, interleaved, median, median_of_ratios, say, seconds
from fine_dist.data.manifest import Manifest
from fine_dist.data.settings import DataConfig
from fine_dist.data.shards import ShardWriter, write_shards
from fine_dist.data.stream import LatentStream

SHAPE, BATCH, CLASSES, FACTOR = (4, 32, 32), 256, 1000, 0.18215


def run(quick: bool) -> list[BenchmarkRow]:
    """All rows.

    Args:
        quick: Whether to measure fewer samples, shards and rounds.
    """
    with tempfile.TemporaryDirectory(prefix="fine_dist-bench-") as folder:
        root = Path(folder)
        count = 16_384 if quick else 65_536
        _make(root / "shards", count)
        return [
            *_throughput(root, count, rounds=2 if quick else 7),
            *_memory(root / "shards", epochs=3 if quick else 10),
            *_start_up(root, num_shards=1000 if quick else 10_000),
            *encoding(root, count=32 if quick else 96, rounds=1 if quick else 5),
        ]


def _make(folder: Path, count: int) -> None:
    """Write shards of 1024 random samples each."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1024, *SHAPE), np.float32) / FACTOR
    infos = []
    for number, start in enumerate(range(0, count, 1024)):
        with ShardWriter(folder, number, SHAPE) as writer:
            for i in range(start, min(start + 1024, count)):
                writer.add(latents[i % 1024], i % CLASSES)
        infos.append(writer.info)
    manifest = Manifest(
        count=count, latent_shape=SHAPE, num_classes=CLASSES, scaling_factor=FACTOR, shards=tuple(filter(None, infos))
    )
    manifest.save(folder)


# --- samples a second ----------------------------------------------------------------------------------------------


class _Files(torch.utils.data.Dataset):
    """A data set with one .npy file for each sample, named NUMBER-LABEL.npy."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(str(path) for path in folder.glob("*.npy"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.load(self.paths[index])), int(self.paths[index].rpartition("-")[2][:-4])


def _plain_webdataset(paths: list[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """webdataset's pipeline as in its documentation: read tar, decode .npy, batch; then float32 and scaled."""

    def decode(sample: dict) -> tuple[np.ndarray, int]:
        return np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False), int(sample["cls"])

    for latents, labels in wds.WebDataset(paths, shardshuffle=False).map(decode).batched(BATCH, partial=False):
        yield torch.from_numpy(latents).float().mul_(FACTOR), torch.from_numpy(labels)


def _throughput(root: Path, count: int, rounds: int) -> list[BenchmarkRow]:
    say("samples a second")
    shards = root / "shards"
    paths = sorted(str(path) for path in shards.glob("*.tar"))
    streams = {
        workers: LatentStream(DataConfig(shards=str(shards), workers=workers), seed=0, global_batch=BATCH)
        for workers in (0, 1, 2)
    }
    batches = {workers: stream.batches() for workers, stream in streams.items()}
    files = _write_files(root / "files", 4096)
    num_plain = min(len(paths), 8)
    num_steps = count // BATCH

    # Each of these functions returns seconds per sample.
    def ours(workers: int) -> float:
        """The stream's batches as the shards store them."""
        return seconds(lambda: [None for _ in islice(batches[workers], num_steps)]) / (num_steps * BATCH)

    def as_float() -> float:
        """The stream's batches, and `Batch.latents`, which converts them to float32 and scales them."""
        return seconds(lambda: [batch.latents is None for batch in islice(batches[0], num_steps)]) / (num_steps * BATCH)

    def plain() -> float:
        return seconds(lambda: [None for _ in _plain_webdataset(paths[:num_plain])]) / (num_plain * 1024)

    def one_file_a_sample() -> float:
        loader = torch.utils.data.DataLoader(files, BATCH, shuffle=True, num_workers=0)
        return seconds(lambda: [latents.float().mul_(FACTOR) for latents, _ in loader]) / len(files)

    def cat() -> float:
        with open(os.devnull, "wb") as nowhere:
            return seconds(lambda: subprocess.run(["cat", *paths], stdout=nowhere, check=True)) / count

    # One thread each, because idle threads of torch's pool would use the cores while the next variant is measured.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleaved(
        {
            "ours": lambda: ours(0),
            "float": as_float,
            "plain": plain,
            "files": one_file_a_sample,
            "cat": cat,
            "one thread": lambda: ours(1),
            "two threads": lambda: ours(2),
        },
        rounds,
    )
    torch.set_num_threads(threads)
    for stream in streams.values():
        stream.close()
    rate = {name: 1 / median(figures) for name, figures in times.items()}
    share = {
        name: median_of_ratios(times["cat"], times[name]) for name in ("ours", "float", "one thread", "two threads")
    }
    return [
        BenchmarkRow("stream, samples a second", rate["ours"], "1/s"),
        BenchmarkRow("stream and conversion to float32", rate["float"], "1/s"),
        BenchmarkRow("plain webdataset, samples a second", rate["plain"], "1/s"),
        BenchmarkRow("one .npy a sample through DataLoader", rate["files"], "1/s"),
        BenchmarkRow("stream, to float32 / plain webdataset", median_of_ratios(times["plain"], times["float"]), "x", 5),
        BenchmarkRow(
            "stream, to float32 / one .npy a sample", median_of_ratios(times["files"], times["float"]), "x", 10
        ),
        BenchmarkRow("stream / cat shards > /dev/null", share["ours"], "x", 0.25),
        BenchmarkRow("stream, to float32 / cat", share["float"], "x"),
        BenchmarkRow("stream with 1 reader thread / cat", share["one thread"], "x"),
        BenchmarkRow("stream with 2 reader threads / cat", share["two threads"], "x"),
    ]


def _write_files(folder: Path, count: int) -> _Files:
    folder.mkdir()
    latents = np.random.default_rng(1).standard_normal((64, *SHAPE)).astype(np.float16)
    for i in range(count):
        np.save(folder / f"{i:06d}-{i % CLASSES}.npy", latents[i % 64])
    return _Files(folder)


# --- memory --------------------------------------------------------------------------------------------------------

_MEASURE_MEMORY = """
import json, sys
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
libraries = resident()
stream = LatentStream(DataConfig(shards=sys.argv[1]), seed=0, global_batch=256)
batches, peaks = stream.batches(), []
for epoch in range(int(sys.argv[2])):
    peak = 0
    for step in range(stream.manifest.count // 256):
        next(batches).latents
        if step % 8 == 0:
            peak = max(peak, resident())
    peaks.append(peak)
print(json.dumps([libraries, peaks]))
"""
"""Prints the memory in MiB after the imports, and its maximum in each epoch."""


def _memory(shards: Path, epochs: int) -> list[BenchmarkRow]:
    """Resident memory of a new process that reads some epochs with the default settings."""
    say(f"memory over {epochs} epochs")
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE_MEMORY, str(shards), str(epochs)], capture_output=True, text=True, check=True
    )
    libraries, peaks = json.loads(result.stdout)
    # Growth is measured from the second epoch on, because the first fills the allocator's pools.
    later = peaks[1:] or peaks
    return [
        BenchmarkRow("memory of a process, highest", max(peaks), "MiB", 300, "lower"),
        BenchmarkRow("of which imported libraries", libraries, "MiB"),
        BenchmarkRow(f"memory's growth from epoch 2 to {epochs}", later[-1] - later[0], "MiB", 10, "lower"),
    ]


# --- start-up and resuming -----------------------------------------------------------------------------------------


def _start_up(root: Path, num_shards: int) -> list[BenchmarkRow]:
    """Time until the first batch of many small shards, from the start and at 90% of an epoch."""
    say(f"starting and resuming with {num_shards:,} shards")
    folder, per_shard = root / "many", 8
    latents = np.zeros((per_shard, *SHAPE), np.float16)
    # Copies of one shard with other keys, because the time depends on the number of shards and not on their content.
    write_shards(folder, latents, np.zeros(per_shard), num_classes=CLASSES, shard_samples=per_shard)
    template = (folder / "latents-000000.tar").read_bytes()
    first = Manifest.parse((folder / "manifest.json").read_bytes(), "").shards[0]
    infos = [first]
    for number in range(1, num_shards):
        name = f"latents-{number:06d}.tar"
        content = bytearray(template)
        _rename(content, f"{number:06d}-".encode())
        (folder / name).write_bytes(content)
        infos.append(first.model_copy(update={"name": name, "key_prefix": f"{number:06d}-"}))
    manifest = Manifest(count=per_shard * num_shards, latent_shape=SHAPE, num_classes=CLASSES, shards=tuple(infos))
    manifest.save(folder)

    def until_first(step: int) -> float:
        started = time.perf_counter()
        with LatentStream(DataConfig(shards=str(folder)), seed=0, global_batch=BATCH) as stream:
            next(stream.batches(step))
            return time.perf_counter() - started

    last = int(0.9 * manifest.count / BATCH)
    times = interleaved({"start": lambda: until_first(0), "resume": lambda: until_first(last)}, 5)
    later = median([b - a for a, b in zip(times["start"], times["resume"])])
    return [
        BenchmarkRow(f"start with {num_shards:,} shards, to the first batch", median(times["start"]), "s", 2, "lower"),
        BenchmarkRow("resuming at 90% of an epoch, beyond starting", later, "s", 3, "lower"),
    ]


def _rename(content: bytearray, prefix: bytes) -> None:
    """Replace the prefix of all keys in a shard, a tar file, and correct the checksums of the headers."""
    for at in range(0, len(content), 512):  # headers are blocks of 512 bytes with the magic bytes `ustar` at 257
        if content[at + 257 : at + 262] == b"ustar":
            content[at : at + len(prefix)] = prefix
            # The checksum is the sum of the header's bytes with spaces in place of the checksum (tar(5)).
            content[at + 148 : at + 156] = b" " * 8
            content[at + 148 : at + 156] = f"{sum(content[at : at + 512]):06o}\0 ".encode()
