"""Reading records out of many shards: one positioned read a sample, checks and conversion a batch at a time.

Letters: B rows of a read, S shards.
"""

from __future__ import annotations

import os
import resource
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from fine_dist.config import DataConfig
from fine_dist.data.records import PREFIX_BYTES, Layout, layout_of, record_key
from fine_dist.data.shards import Manifest, ShardInfo, file_sha256
from fine_dist.data.sources import copy, is_remote, locate
from fine_dist.errors import DataError

_FETCHERS = 4
"""Threads that bring shards."""


@dataclass
class Rows:
    """latents float32 [B, ...] unscaled, labels int64 [B], and what is wrong with which row (its numbers are void)."""

    latents: torch.Tensor
    labels: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)


class Shard:
    """One shard, opened when it is first needed. `fault` says why it cannot be used, if it cannot."""

    def __init__(self, info: ShardInfo, base: str, config: DataConfig, layout: Layout) -> None:
        self.info, self.url = info, f"{base}/{info.name}"
        self.fault: str | None = None
        self.fd = -1
        self._config, self._layout = config, layout
        self._lock = threading.Lock()
        self._opened = False

    def ready(self) -> Shard:
        """Open the shard, once; threads that come later wait."""
        if not self._opened:
            with self._lock:
                if not self._opened:
                    self._open()
                    self._opened = True
        return self

    def _open(self) -> None:
        try:
            self.fd = self._fetch() if is_remote(self.url) else os.open(self.url, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.fault = "the manifest lists this shard, but it is absent"
            return
        except DataError as error:
            self.fault = str(error)
            return
        size = os.fstat(self.fd).st_size
        if self._config.verify != "none" and size != self.info.bytes:
            self.fault = f"{size} bytes, but the manifest says {self.info.bytes}: truncated or replaced"
        elif self._config.verify == "sha256" and file_sha256(f"/dev/fd/{self.fd}") != self.info.sha256:
            self.fault = "its sha256 is not the manifest's: damaged or replaced"
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def _fetch(self) -> int:
        with tempfile.TemporaryFile(prefix="fine_dist-") as stream:
            copy(self.url, stream, self._config)
            return os.dup(stream.fileno())

    def __del__(self) -> None:
        # readers hold the object while they read, so the file is closed under nobody
        if self.fd >= 0:
            os.close(self.fd)


class ShardSet:
    """The shards of a manifest, with at most those open that the shuffle windows need."""

    def __init__(self, where: str, config: DataConfig) -> None:
        self.manifest, self.base = locate(where, config)
        self.remote = is_remote(self.base)
        self.bad = 0
        self._config = config
        self._layout = layout_of(self.manifest.stored_shape, self.manifest.dtype)
        self._shards: dict[int, Shard] = {}
        prefixes = [(info.key_prefix or "")[:PREFIX_BYTES].ljust(PREFIX_BYTES) for info in self.manifest.shards]
        self._prefixes_SP = np.frombuffer("".join(prefixes).encode(), np.uint8).reshape(-1, PREFIX_BYTES)
        self._counted: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._fetchers: ThreadPoolExecutor | None = None
        _allow_open_files()

    def keep(self, live: set[int], ahead: list[int]) -> None:
        """Close all shards but these; begin to bring those that are needed now or soon."""
        with self._lock:
            wanted = live.union(ahead)
            for number in [n for n in self._shards if n not in wanted]:
                del self._shards[number]
            if not self.remote:
                return
            self._fetchers = self._fetchers or ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
            for number in [*live, *(n for n in ahead if n not in live)]:
                if number not in self._shards:
                    self._fetchers.submit(self._shard(number).ready)

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = Shard(self.manifest.shards[number], self.base, self._config, self._layout)
        return self._shards[number]

    def read(self, shard_B: np.ndarray, index_B: np.ndarray) -> Rows:
        """The records at (shard, index), unscaled float32, with the faults of those that are not good."""
        numbers = shard_B.tolist()
        with self._lock:
            shards = {number: self._shard(number) for number in set(numbers)}
        files = {number: shard.ready().fd for number, shard in shards.items()}
        faults = {row: shards[n].fault or "" for row, n in enumerate(numbers) if shards[n].fault}
        layout, size = self._layout, self._layout.size
        buffer, rows = self._buffer(len(numbers))
        read = os.preadv
        for row, (view, number, offset) in enumerate(zip(rows, numbers, (index_B * layout.stride).tolist())):
            if faults and row in faults:
                continue
            if read(files[number], view, offset) != size:
                faults[row] = "the file ends within this record"
        good, labels = layout.check(buffer[:, : layout.head], self._prefixes_SP[shard_B], index_B)
        latents = self._convert(buffer)
        good &= labels < self.manifest.num_classes
        if not good.all() or not bool(torch.isfinite(latents.sum())):
            for row in range(len(numbers)):
                if row not in faults and not (good[row] and bool(torch.isfinite(latents[row]).all())):
                    faults[row] = self._explain(buffer[row], int(labels[row]), latents[row])
        return Rows(latents, labels, faults)

    def _convert(self, buffer: np.ndarray) -> torch.Tensor:
        """The payloads of a buffer of records, as float32."""
        layout = self._layout
        inner = np.empty(layout.shape, layout.dtype).strides
        payload = np.ndarray(
            (len(buffer), *layout.shape), layout.dtype, buffer, layout.head, (buffer.strides[0], *inner)
        )
        return torch.empty(payload.shape, dtype=torch.float32).copy_(torch.from_numpy(payload))

    def _buffer(self, count: int) -> tuple[np.ndarray, list[tuple[memoryview]]]:
        """This thread's scratch memory for so many records, and a view of each."""
        kept = getattr(self._scratch, "kept", None)
        if kept is None or len(kept[0]) != count:
            width = -(-self._layout.size // 64) * 64
            array = np.empty((count, width), np.uint8)
            kept = self._scratch.kept = (array, [(memoryview(row)[: self._layout.size],) for row in array])
        return kept

    def _explain(self, record: np.ndarray, label: int, latent: torch.Tensor) -> str:
        if not bool(torch.isfinite(latent).all()):
            return "the latent has NaN or Inf"
        if label >= self.manifest.num_classes:
            return f"label {label}, but the manifest has {self.manifest.num_classes} classes"
        return "not the record that the manifest promises"

    def count_bad(self, shard: int, index: int, fault: str) -> None:
        """Count a damaged sample, or a whole damaged shard, once. `DataError` above `max_bad_fraction`."""
        info = self.manifest.shards[shard]
        whole = self._shards[shard].fault is not None
        mark = (shard, -1 if whole else index)
        with self._lock:
            if mark not in self._counted:
                self._counted.add(mark)
                self.bad += info.count if whole else 1
        if self.bad > self._config.max_bad_fraction * self.manifest.count:
            key = "" if whole else f" {record_key(info.key_prefix or '', index)}:"
            raise DataError(
                f"{self.base}/{info.name}:{key} {fault} ({self.bad} of {self.manifest.count} samples are damaged; "
                f"data.max_bad_fraction allows {self._config.max_bad_fraction:g} to be skipped)"
            )

    def close(self) -> None:
        """Close every shard and stop bringing more."""
        if self._fetchers:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._shards.clear()


def _allow_open_files() -> None:
    """As many open files as the system lets this process have; windows of many streams need hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 and (hard == resource.RLIM_INFINITY or hard > soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(4096, hard), hard))
