"""Reads records out of many shards: one positioned read for each sample, directly into the batch, and then checks.

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
from fine_dist.data.records import PREFIX_BYTES, TOKENS, all_finite
from fine_dist.data.settings import DataConfig
from fine_dist.data.shard_file import Indexes, Shard
from fine_dist.data.shards import Channels
from fine_dist.data.sources import is_remote, locate

_CHUNK = 64
"""Records that are read and checked together: they should fit into the processor's cache."""
_FETCHERS = 8
"""Threads that bring remote shards."""
_SHORT, NOT_FINITE = "the file ends, or cannot be read, within this sample", "the latent has NaN or Inf"


@dataclass
class Rows:
    """The records of one read.

    Attributes:
        stored: [B, ...] in the shards' dtype, unscaled.
        labels: int64 [B].
        scale, shift: Scale and shift that `latents` applies.
        faults: What is wrong with damaged rows, by row; the numbers of such a row are meaningless.
        tokens: [B, E, h, w], where they were asked for.
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
    """The shards of a manifest, with at most those open that the shuffle windows need."""

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

    def keep(self, live: set[int], ahead: list[int]) -> None:
        """Close all shards but these, and open those in `ahead` in the background (with remote ones in `live`)."""
        with self._lock:
            # Files are closed by reference counting: a read that is under way in another thread holds its `Shard`.
            wanted = live.union(ahead)
            for number in [n for n in self._shards if n not in wanted]:
                del self._shards[number]
            for number in [*(live if self.remote else ()), *ahead]:
                if number not in self._shards:
                    self._fetchers = self._fetchers or ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
                    # In the background: a window's first read would otherwise
                    # wait for the network, once for each of its shards.
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
            scaled: Whether `latents` of the result applies the manifest's scale and shift.
            tokens: Whether the image encoder's tokens are read as well, which the manifest must have.
        """
        numbers = shard_B.tolist()
        with self._lock:
            shards = {number: self._shards.get(number) or self.shard(number) for number in set(numbers)}
        # A list and not a generator: every shard must be opened, also behind one that is not regular.
        regular = all([shard.ready().regular for shard in shards.values()])
        # a shard of fewer samples than the manifest says has an index and a fault: nothing in it is read by number
        sound = [shard.fault is None and shard.index and not shard.index.faults for shard in shards.values()]
        indexed = not regular and all(sound)
        # NumPy's memory, not torch's aligned blocks: with those the heap was seen to grow by up to 90 MiB
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
        """Read the tokens that lie behind the latents; damage to them is damage of the sample."""
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

        A chunk of records is read and checked while it is in the processor's cache. `first` is the row of `rows` that
        the first record becomes.
        """
        layout, count = self._layout, len(index_N)
        files, offsets = [shards[number].fd for number in shard_N.tolist()], (index_N * layout.stride).tolist()
        payloads_NP = stored_N.reshape(count, -1).view(np.uint8)
        heads_NH, heads = self._scratch_for(min(_CHUNK, count))
        marks, sizes, finite = [], list[int](), True
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            try:
                # One system call a record scatters its head into scratch memory and its payload into the batch, so
                # payloads are never copied. `map` keeps the loop in C; Python's lock is released inside each read.
                sizes += map(os.preadv, files[part], zip(heads, payloads_NP[part]), offsets[part])
            except OSError:
                # The fast path stopped somewhere inside this chunk: its records are read again, one error at a time.
                del sizes[start:]
                sizes += map(_try_to_read, files[part], zip(heads, payloads_NP[part]), offsets[part])
            # Taken while the heads are in the cache; the scratch memory is overwritten by the next chunk.
            marks.append(layout.marks(heads_NH[: count - start]))
            finite = finite and all_finite(stored_N[part])
        # Checked together, because NumPy's cost per call would dominate for 64 records.
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
        """Read samples of shards that another program wrote, whose heads were checked when they were opened."""
        offsets_B = np.empty(len(shard_B), np.int64)
        for number, shard in shards.items():
            assert shard.index is not None
            own = np.flatnonzero(shard_B == number)
            offsets_B[own] = shard.index.offsets[index_B[own]]
            rows.labels[own] = shard.index.labels[index_B[own]]
        files, size = [shards[number].fd for number in shard_B.tolist()], stored_B[:1].nbytes
        payloads_BP = stored_B.reshape(len(shard_B), -1).view(np.uint8)
        sizes = list(map(_try_to_read, files, zip(payloads_BP), offsets_B.tolist()))
        if min(sizes) == size and all_finite(stored_B):
            return
        for row, got in enumerate(sizes):
            if got != size:
                rows.faults[row] = _SHORT
            elif not all_finite(stored_B[row]):
                rows.faults[row] = NOT_FINITE

    def _explain(self, shard: Shard, index: int) -> str:
        """The reason why the check refused a record."""
        layout = self._layout
        record = os.pread(shard.fd, layout.size, index * layout.stride)
        return layout.explain(record, shard.key(index), self.manifest.num_classes)

    def _read_any(
        self, shards: dict[int, Shard], shard_B: np.ndarray, index_B: np.ndarray, stored_B: np.ndarray, rows: Rows
    ) -> None:
        """Read samples of which some are in shards that another program wrote, or in damaged ones."""
        for row, (number, index) in enumerate(zip(shard_B.tolist(), index_B.tolist())):
            shard, one, stored = shards[number], slice(row, row + 1), stored_B[row]
            if shard.fault is not None:
                rows.faults[row] = shard.fault
            elif shard.index is None:
                self._read_regular(shards, shard_B[one], index_B[one], stored_B[one], rows, row)
            elif index in shard.index.faults:
                rows.faults[row] = shard.index.faults[index]
            else:
                got = os.preadv(shard.fd, (stored.data,), int(shard.index.offsets[index]))
                rows.labels[row] = shard.index.labels[index]
                if got != stored.nbytes:
                    rows.faults[row] = _SHORT
                elif not all_finite(stored):
                    rows.faults[row] = NOT_FINITE

    def _scratch_for(self, count: int) -> tuple[np.ndarray, list[memoryview]]:
        """This thread's scratch memory for the heads of so many records, and a view of each."""
        # Thread-local: worker threads read at the same time.
        kept: dict[Any, Any] = self._scratch.__dict__
        if count not in kept:
            heads_NH = self._layout.heads(count)
            kept[count] = (heads_NH, [memoryview(head) for head in heads_NH])
        return kept[count]

    def count_bad(self, shard: int, index: int, fault: str) -> None:
        """Count a damaged sample, or all samples of a damaged shard, once.

        Raises:
            DataError: More than `max_bad_fraction` of all samples are damaged.
        """
        info = self.manifest.shards[shard]
        with self._lock:
            holder = self.shard(shard)
            whole = holder.fault is not None
            # A set, since the same damaged sample comes again every epoch and counts once.
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
        """Close all shards and stop opening others in the background."""
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
    """Raise the soft limit of open files, to 4096 if the system allows it: windows of many streams need hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 and (hard == resource.RLIM_INFINITY or hard > soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(4096, hard), hard))
