"""Reads records of many shards: one positioned read per sample, directly into the batch, and checks them.

Letters: B rows of a read, S shards.
"""

from __future__ import annotations

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fine_dist.core.errors import DataError
from fine_dist.data.batch import as_float
from fine_dist.data.manifest import Channels
from fine_dist.data.records import PREFIX_BYTES, TOKENS, all_finite
from fine_dist.data.settings import DataConfig
from fine_dist.data.shard_file import Indexes, Shard
from fine_dist.data.sources import is_remote, locate

_CHUNK = 64
"""Number of records that are read and checked together; they should fit into the processor's cache."""
_FETCHERS = 8
"""Threads that fetch remote shards."""
_SHORT, NOT_FINITE = "the file ends, or cannot be read, within this sample", "the latent has NaN or Inf"


@dataclass
class Rows:
    """The records of one read.

    Attributes:
        stored: [B, ...] in the shards' dtype, unscaled.
        labels: int64 [B].
        scale, shift: Scale and shift that `latents` applies.
        faults: The error of each damaged row, by row. The values of such a row are undefined.
        tokens: [B, E, h, w]; None unless they were requested.
    """

    stored: torch.Tensor
    labels: np.ndarray
    scale: Channels
    shift: Channels = 0.0
    faults: dict[int, str] = field(default_factory=dict)
    tokens: torch.Tensor | None = None

    @property
    def latents(self) -> torch.Tensor:
        """float32 [B, ...], `(stored - shift) * scale`."""
        return as_float(self.stored, self.scale, self.shift)


class ShardSet:
    """The shards of a manifest. Only those that the shuffle windows need are open."""

    def __init__(self, where: str, config: DataConfig) -> None:
        self.manifest, self.base = locate(where, config)
        self.remote = is_remote(self.base)
        self.bad = 0
        self._config = config
        self._layout = self.manifest.layout
        self._shards: dict[int, Shard] = {}
        self._indexes: Indexes = {}
        prefixes = [(info.key_prefix or "")[:PREFIX_BYTES].ljust(PREFIX_BYTES) for info in self.manifest.shards]
        self._prefixes_SP = np.frombuffer("".join(prefixes).encode(), np.uint8).reshape(-1, PREFIX_BYTES)
        self._counted: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._fetchers: ThreadPoolExecutor | None = None
        _allow_open_files()

    def keep_open(self, live: set[int], ahead: list[int]) -> None:
        """Close all other shards, and open new ones in the background.

        Args:
            live: Numbers of shards that are being read. Remote ones are opened in the background as well.
            ahead: Numbers of shards that will be read next.
        """
        with self._lock:
            # Files are closed by reference counting, because another thread may still read from a `Shard`.
            wanted = live.union(ahead)
            for number in [n for n in self._shards if n not in wanted]:
                del self._shards[number]
            for number in [*(live if self.remote else ()), *ahead]:
                if number not in self._shards:
                    self._fetchers = self._fetchers or ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
                    # In the background, so that the first read of a window does not wait for the network.
                    self._fetchers.submit(self.shard(number).ready)

    def shard(self, number: int) -> Shard:
        """A shard by its number, not yet opened."""
        if number not in self._shards:
            info = self.manifest.shards[number]
            self._shards[number] = Shard(f"{self.base}/{info.name}", info, self.manifest, self._config, self._indexes)
        return self._shards[number]

    def read(self, shard_B: np.ndarray, index_B: np.ndarray, *, scaled: bool = False, tokens: bool = False) -> Rows:
        """Read records.

        Args:
            shard_B: int64, number of each record's shard.
            index_B: int64, number of each record in its shard.
            scaled: Whether `Rows.latents` applies the manifest's scale and shift.
            tokens: Whether the image encoder's tokens are read as well; the shards must hold them.
        """
        numbers = shard_B.tolist()
        with self._lock:
            shards = {number: self._shards.get(number) or self.shard(number) for number in set(numbers)}
        # A list and not a generator, so that every shard is opened and `all` does not stop at the first irregular one.
        regular = all([shard.ready().regular for shard in shards.values()])
        # A shard with fewer samples than the manifest states has an index and a fault, and is not read by number.
        sound = [shard.fault is None and shard.index and not shard.index.faults for shard in shards.values()]
        indexed = not regular and all(sound)
        # Allocated by NumPy: with torch's aligned blocks the heap grew by up to 90 MiB.
        stored = np.empty((len(numbers), *self._layout.shape), self._layout.dtype)
        rows = Rows(
            torch.from_numpy(stored),
            np.empty(len(numbers), np.int64),
            *(self.manifest.stored_scaling if scaled else (1.0, 0.0)),
        )
        if regular:
            self._read_regular(shards, shard_B, index_B, stored, rows, 0)
        elif indexed:
            self._read_indexed(shards, shard_B, index_B, stored, rows)
        else:
            self._read_any(shards, shard_B, index_B, stored, rows)
        if tokens:
            self._read_tokens(shards, shard_B, index_B, rows)
        return rows

    def _read_tokens(self, shards: dict[int, Shard], shard_B: np.ndarray, index_B: np.ndarray, rows: Rows) -> None:
        """Read the tokens that follow the latents. A damaged token makes the sample damaged."""
        layout = self._layout.tokens
        assert layout is not None
        tokens_B = np.empty((len(index_B), *layout.shape), layout.dtype)
        heads_BH = np.zeros((len(index_B), layout.head), np.uint8)
        payloads_BP = tokens_B.reshape(len(index_B), -1).view(np.uint8)
        files = [shards[number].fd for number in shard_B.tolist()]
        offsets = (index_B * self._layout.stride + layout.at).tolist()
        sizes = list(map(_try_to_read, files, zip(heads_BH, payloads_BP), offsets))
        good_B = layout.check(heads_BH, self._layout.keys(self._prefixes_SP[shard_B], index_B))
        rows.tokens = torch.from_numpy(tokens_B)
        if min(sizes) == layout.size and good_B.all() and all_finite(tokens_B):
            return
        for row, number in enumerate(shard_B.tolist()):
            if row in rows.faults:
                continue
            if not shards[number].regular or (sizes[row] == layout.size and not good_B[row]):
                rows.faults[row] = f"its image's tokens are not where the manifest says: {TOKENS} is missing or damaged"
            elif sizes[row] < layout.size:
                rows.faults[row] = _SHORT
            elif not all_finite(tokens_B[row]):
                rows.faults[row] = "its image's tokens have NaN or Inf"

    def _read_regular(
        self,
        shards: dict[int, Shard],
        shard_N: np.ndarray,
        index_N: np.ndarray,
        stored_N: np.ndarray,
        rows: Rows,
        first: int,
    ) -> None:
        """Read records of regular shards: payloads into `stored_N`, heads into a buffer of this thread.

        A chunk of records is read and checked while it is in the processor's cache. The records fill `rows` from row
        `first` on.
        """
        layout, count = self._layout, len(index_N)
        files, offsets = [shards[number].fd for number in shard_N.tolist()], (index_N * layout.stride).tolist()
        payloads_NP = stored_N.reshape(count, -1).view(np.uint8)
        heads_NH, heads = self._scratch_for(min(_CHUNK, count))
        marks, sizes, finite = [], list[int](), True
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            try:
                # One system call per record scatters the head into scratch memory and the payload into the batch, so
                # that payloads are never copied. `map` keeps the loop in C, and each read releases the GIL.
                sizes += map(os.preadv, files[part], zip(heads, payloads_NP[part]), offsets[part])
            except OSError:
                # The fast path failed somewhere in this chunk, so its records are read again, each with its own error.
                del sizes[start:]
                sizes += map(_try_to_read, files[part], zip(heads, payloads_NP[part]), offsets[part])
            # Gathered now, while the heads are in the cache and before the next chunk overwrites them.
            marks.append(layout.marks(heads_NH[: count - start]))
            finite = finite and all_finite(stored_N[part])
        # One check for all chunks, because NumPy's cost per call would dominate for 64 records.
        good_N, labels_N = layout.check(np.concatenate(marks), self._prefixes_SP[shard_N], index_N)
        good_N &= labels_N < self.manifest.num_classes
        rows.labels[first : first + count] = labels_N
        if finite and min(sizes) == layout.size and good_N.all():
            return
        for row in range(count):
            if sizes[row] < layout.size:
                rows.faults[first + row] = _SHORT
            elif not good_N[row]:
                rows.faults[first + row] = self._explain(shards[int(shard_N[row])], int(index_N[row]))
            elif not all_finite(stored_N[row]):
                rows.faults[first + row] = NOT_FINITE

    def _read_indexed(
        self, shards: dict[int, Shard], shard_B: np.ndarray, index_B: np.ndarray, stored_B: np.ndarray, rows: Rows
    ) -> None:
        """Read samples of another program's shards, whose headers were checked when they were opened."""
        offsets_B = np.empty(len(shard_B), np.int64)
        for number, shard in shards.items():
            assert shard.index is not None
            rows_of_shard = np.flatnonzero(shard_B == number)
            offsets_B[rows_of_shard] = shard.index.offsets[index_B[rows_of_shard]]
            rows.labels[rows_of_shard] = shard.index.labels[index_B[rows_of_shard]]
        files, size = [shards[number].fd for number in shard_B.tolist()], stored_B[:1].nbytes
        payloads_BP = stored_B.reshape(len(shard_B), -1).view(np.uint8)
        sizes = list(map(_try_to_read, files, zip(payloads_BP), offsets_B.tolist()))
        if min(sizes) == size and all_finite(stored_B):
            return
        for row, num_bytes in enumerate(sizes):
            if num_bytes != size:
                rows.faults[row] = _SHORT
            elif not all_finite(stored_B[row]):
                rows.faults[row] = NOT_FINITE

    def _explain(self, shard: Shard, index: int) -> str:
        """Why the check refused a record."""
        layout = self._layout
        record = os.pread(shard.fd, layout.size, index * layout.stride)
        return layout.explain(record, shard.key(index), self.manifest.num_classes)

    def _read_any(
        self, shards: dict[int, Shard], shard_B: np.ndarray, index_B: np.ndarray, stored_B: np.ndarray, rows: Rows
    ) -> None:
        """Read samples one by one, when some are in another program's shards or in damaged ones."""
        for row, (number, index) in enumerate(zip(shard_B.tolist(), index_B.tolist())):
            shard, one, stored = shards[number], slice(row, row + 1), stored_B[row]
            if shard.fault is not None:
                rows.faults[row] = shard.fault
            elif shard.index is None:
                self._read_regular(shards, shard_B[one], index_B[one], stored_B[one], rows, row)
            elif index in shard.index.faults:
                rows.faults[row] = shard.index.faults[index]
            else:
                num_bytes = os.preadv(shard.fd, (stored.data,), int(shard.index.offsets[index]))
                rows.labels[row] = shard.index.labels[index]
                if num_bytes != stored.nbytes:
                    rows.faults[row] = _SHORT
                elif not all_finite(stored):
                    rows.faults[row] = NOT_FINITE

    def _scratch_for(self, count: int) -> tuple[np.ndarray, list[memoryview]]:
        """This thread's buffer for the heads of `count` records, and a view of each head."""
        # Thread-local, because worker threads read concurrently.
        buffers: dict[Any, Any] = self._scratch.__dict__
        if count not in buffers:
            heads_NH = self._layout.heads(count)
            buffers[count] = (heads_NH, [memoryview(head) for head in heads_NH])
        return buffers[count]

    def count_bad(self, shard: int, index: int, fault: str) -> None:
        """Count a damaged sample, or all samples of a damaged shard, once.

        Raises:
            DataError: More than `max_bad_fraction` of all samples are damaged.
        """
        info = self.manifest.shards[shard]
        with self._lock:
            holder = self.shard(shard)
            is_shard = holder.fault is not None
            # A set, because a damaged sample recurs in every epoch and counts once.
            mark = (shard, -1 if is_shard else index)
            if mark not in self._counted:
                self._counted.add(mark)
                self.bad += info.count if is_shard else 1
        if self.bad > self._config.max_bad_fraction * self.manifest.count:
            key = "" if is_shard else f" {holder.key(index)}:"
            raise DataError(
                f"{holder.url}:{key} {fault} ({self.bad} of {self.manifest.count} samples are damaged; "
                f"data.max_bad_fraction allows {self._config.max_bad_fraction:g} to be skipped)"
            )

    def close(self) -> None:
        """Close all shards and stop opening shards in the background."""
        if self._fetchers:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._shards.clear()


def _try_to_read(file: int, views: tuple[Any, ...], offset: int) -> int:
    """Number of bytes read; 0 when the read fails."""
    try:
        return os.preadv(file, views, offset)
    except OSError:
        return 0


def _allow_open_files() -> None:
    """Raise the soft limit of open files to 4096 if allowed, because windows of many streams need hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 and (hard == resource.RLIM_INFINITY or hard > soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(4096, hard), hard))
