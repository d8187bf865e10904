"""Reading records out of many shards: one positioned read a sample, checks and conversion a batch at a time.

Letters: B rows of a read, S shards.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fine_dist.config import DataConfig
from fine_dist.data.records import BLOCK, PREFIX_BYTES, layout_of, record_key
from fine_dist.data.shards import Manifest, ShardInfo
from fine_dist.data.sources import is_remote, locate, open_shard
from fine_dist.data.tarscan import ShardIndex, TarFault, index_tar
from fine_dist.errors import DataError
from fine_dist.files import sha256_of

_CHUNK = 64
"""Records that are read, checked and converted together: they should fit into the processor's cache."""
_GRAIN = 32768
"""torch hands operations on so many numbers to its pool of threads."""
_FETCHERS = 8
"""Threads that bring remote shards."""
_SHORT, NOT_FINITE = "the file ends, or cannot be read, within this sample", "the latent has NaN or Inf"


@dataclass
class Rows:
    """latents float32 [B, ...] unscaled, labels int64 [B], and what is wrong with which row (its numbers are void)."""

    latents: torch.Tensor
    labels: np.ndarray
    faults: dict[int, str] = field(default_factory=dict)


class Shard:
    """One shard, opened when it is first needed.

    `fault`: why none of it can be used. `index`: where its samples are, when they are not at regular places.
    `regular`: usable, and all its records have one size.
    """

    def __init__(self, url: str, info: ShardInfo, manifest: Manifest, config: DataConfig) -> None:
        self.url, self.info = url, info
        self.fault: str | None = None
        self.index: ShardIndex | None = None
        self.regular = False
        self.fd = -1
        self._manifest, self._config = manifest, config
        self._lock = threading.Lock()
        self._opened = False

    def ready(self) -> Shard:
        """Open the shard, once; threads that come later wait. `DataError` when a remote one cannot be had."""
        if not self._opened:
            with self._lock:
                if not self._opened:
                    self.fault = self._open()
                    self.regular = self.fault is None and self.index is None
                    self._opened = True
        return self

    def _open(self) -> str | None:
        """Open the file and return what is wrong with it."""
        try:
            self.fd = open_shard(self.url, self.info, self._config)
        except (FileNotFoundError, NotADirectoryError):
            return "the manifest lists this shard, but it is absent"
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                return f"it cannot be opened: {error.strerror}"
            raise DataError(
                f"{self.url}: too many open files; raise the limit (ulimit -n) or lower data.window or data.streams"
            ) from None
        size = os.fstat(self.fd).st_size
        if self._config.verify != "none" and size != self.info.bytes:
            return f"{size} bytes, but the manifest says {self.info.bytes}: truncated or replaced"
        if self._config.verify == "sha256" and sha256_of(f"/dev/fd/{self.fd}") != self.info.sha256:
            return "its sha256 is not the manifest's: damaged or replaced"
        # ask the system to bring the file in one sweep: the reads that follow are in random order
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_WILLNEED)
        if self.info.key_prefix is not None:
            return self._count_regular(size)
        return self._find(size)

    def _count_regular(self, size: int) -> str | None:
        """Whether a shard of records of one size ends where the manifest says: a block of zeros ends a tar."""
        count, stride = self.info.count, layout_of(self._manifest.stored_shape, self._manifest.dtype).stride
        room = size // stride
        if room < count:
            return f"the manifest says {count} samples; it has {room}"
        if size >= count * stride + BLOCK and any(os.pread(self.fd, BLOCK, count * stride)):
            return f"the manifest says {count} samples; it has more, or records of another size"
        if count and not any(os.pread(self.fd, BLOCK, (count - 1) * stride)):
            return f"the manifest says {count} samples; it has fewer, or records of another size"
        return None

    def _find(self, size: int) -> str | None:
        """Look for the samples of a tar that another program wrote."""
        manifest = self._manifest
        try:
            with open(self.fd, "rb", buffering=1 << 18, closefd=False) as stream:
                self.index = index_tar(stream, size, manifest.stored_shape, manifest.dtype, manifest.num_classes)
        except TarFault as error:
            return str(error)
        if len(self.index.keys) != self.info.count:
            return f"the manifest says {self.info.count} samples; it has {len(self.index.keys)}"
        return None

    def key(self, number: int) -> str:
        """The key of a sample."""
        if self.index is not None:
            return self.index.keys[number]
        return record_key(self.info.key_prefix or "", number)

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
        """Close all shards but these; begin to bring those that are needed soon (and remote ones needed now)."""
        with self._lock:
            wanted = live.union(ahead)
            for number in [n for n in self._shards if n not in wanted]:
                del self._shards[number]
            for number in [*(live if self.remote else ()), *ahead]:
                if number not in self._shards:
                    self._fetchers = self._fetchers or ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
                    self._fetchers.submit(self.shard(number).ready)

    def shard(self, number: int) -> Shard:
        """A shard by its number, not yet opened."""
        if number not in self._shards:
            info = self.manifest.shards[number]
            self._shards[number] = Shard(f"{self.base}/{info.name}", info, self.manifest, self._config)
        return self._shards[number]

    def read(self, shard_B: np.ndarray, index_B: np.ndarray, scale: float = 1.0) -> Rows:
        """The records at (shard, index), as float32 times `scale`, with the faults of those that are not good."""
        numbers = shard_B.tolist()
        with self._lock:
            shards = {number: self._shards.get(number) or self.shard(number) for number in set(numbers)}
        regular = all([shard.ready().regular for shard in shards.values()])
        # NumPy's memory, not torch's aligned blocks: with those the heap was seen to grow by up to 90 MiB
        latents = torch.from_numpy(np.empty((len(numbers), *self._layout.shape), np.float32))
        rows = Rows(latents, np.empty(len(numbers), np.int64))
        if regular:
            self._read_regular(shards, shard_B, index_B, scale, rows, 0)
        else:
            self._read_any(shards, shard_B, index_B, scale, rows)
        return rows

    def _read_regular(
        self, shards: dict[int, Shard], shard_N: np.ndarray, index_N: np.ndarray, scale: float, rows: Rows, first: int
    ) -> None:
        """Read records of shards in which all have one size, whole, into the rows from `first` on."""
        layout, count = self._layout, len(index_N)
        files, offsets = [shards[number].fd for number in shard_N.tolist()], (index_N * layout.stride).tolist()
        latents, marks, finite = rows.latents[first : first + count], [], True
        sizes: list[int] = []
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            buffer_NB, views, pieces = self._scratch_for(min(_CHUNK, count - start))
            try:
                sizes += map(os.preadv, files[part], views, offsets[part])
            except OSError:
                del sizes[start:]
                sizes += map(_try_to_read, files[part], views, offsets[part])
            marks.append(layout.marks(buffer_NB))
            finite = layout.all_finite(buffer_NB) and finite
            for to, piece in zip(latents[part].split(len(pieces[0])), pieces):
                to.copy_(piece)
            if scale != 1:
                numbers = latents[part].numpy()
                np.multiply(numbers, np.float32(scale), out=numbers)
        marks_NW = np.concatenate(marks)
        good_N, labels_N = layout.check(marks_NW, self._prefixes_SP[shard_N], index_N)
        good_N &= labels_N < self.manifest.num_classes
        rows.labels[first : first + count] = labels_N
        if finite and min(sizes) == layout.size and good_N.all():
            return
        for row in range(count):
            if sizes[row] < layout.size:
                rows.faults[first + row] = _SHORT
            elif not good_N[row]:
                rows.faults[first + row] = self._explain(shards[int(shard_N[row])], int(index_N[row]))
            elif not bool(torch.isfinite(latents[row]).all()):
                rows.faults[first + row] = NOT_FINITE

    def _explain(self, shard: Shard, index: int) -> str:
        """What is wrong with a record that the check refused."""
        layout = self._layout
        record = os.pread(shard.fd, layout.size, index * layout.stride)
        return layout.explain(record, shard.key(index), self.manifest.num_classes)

    def _read_any(
        self, shards: dict[int, Shard], shard_B: np.ndarray, index_B: np.ndarray, scale: float, rows: Rows
    ) -> None:
        """Read samples of which some are in shards that another program wrote, or in damaged ones."""
        for row, (number, index) in enumerate(zip(shard_B.tolist(), index_B.tolist())):
            shard, one = shards[number], slice(row, row + 1)
            if shard.fault is not None:
                rows.faults[row] = shard.fault
            elif shard.index is None:
                self._read_regular(shards, shard_B[one], index_B[one], scale, rows, row)
            elif index in shard.index.faults:
                rows.faults[row] = shard.index.faults[index]
            else:
                latent = np.empty(self._layout.shape, self._layout.dtype)
                got = os.preadv(shard.fd, (latent.data,), int(shard.index.offsets[index]))
                rows.labels[row] = shard.index.labels[index]
                rows.latents[row].copy_(torch.from_numpy(latent)).mul_(scale)
                if got != latent.nbytes:
                    rows.faults[row] = _SHORT
                elif not np.isfinite(latent).all():
                    rows.faults[row] = NOT_FINITE

    def _scratch_for(self, count: int) -> tuple[np.ndarray, list[tuple[memoryview]], tuple[torch.Tensor, ...]]:
        """This thread's scratch memory for so many records: the buffer, a view of each, and their latents.

        The latents are in pieces that torch converts in the calling thread: its pool of threads is the model's, and
        on a busy machine a reader would wait for all of them at every piece.
        """
        kept: dict[Any, Any] = self._scratch.__dict__
        grain = _GRAIN if torch.get_num_threads() > 1 else sys.maxsize
        if (count, grain) not in kept:
            buffer = self._layout.buffer(count)
            views = [(memoryview(row)[: self._layout.size],) for row in buffer]
            payload = torch.from_numpy(self._layout.payload(buffer))
            kept[count, grain] = (buffer, views, payload.split(max(1, (grain - 1) // payload[0].numel())))
        return kept[count, grain]

    def count_bad(self, shard: int, index: int, fault: str) -> None:
        """Count a damaged sample, or a whole damaged shard, once. `DataError` above `max_bad_fraction`."""
        info = self.manifest.shards[shard]
        with self._lock:
            holder = self.shard(shard)
            whole = holder.fault is not None
            mark = (shard, -1 if whole else index)
            if mark not in self._counted:
                self._counted.add(mark)
                self.bad += info.count if whole else 1
        if self.bad > self._config.max_bad_fraction * self.manifest.count:
            key = "" if whole else f" {holder.key(index)}:"
            raise DataError(
                f"{holder.url}:{key} {fault} ({self.bad} of {self.manifest.count} samples are damaged; "
                f"data.max_bad_fraction allows {self._config.max_bad_fraction:g} to be skipped)"
            )

    def close(self) -> None:
        """Close every shard and stop bringing more."""
        if self._fetchers:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._shards.clear()


def _try_to_read(file: int, view: tuple[memoryview], offset: int) -> int:
    """Bytes read; none where the device fails."""
    try:
        return os.preadv(file, view, offset)
    except OSError:
        return 0


def _allow_open_files() -> None:
    """As many open files as the system lets this process have; windows of many streams need hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 and (hard == resource.RLIM_INFINITY or hard > soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(4096, hard), hard))
