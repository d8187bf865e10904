"""The order of samples in an endless sequence of global batches: a pure function of (seed, step, position).

The shards of an epoch, in a seeded order, form one sequence of N samples. It is cut into C equal spans, one for each
canonical stream; a global batch takes B/C samples from every stream. Within a stream, windows of whole shards are
shuffled. The order does not depend on processes or workers, and the step is the only state.

If N is not a multiple of B, the last batch of an epoch is filled with the first samples of the next epoch. Stream s has
read floor((e N + s) / C) samples when epoch e begins; over the C streams this adds up to e N exactly (Hermite's
identity), so every sample comes once an epoch although C need not divide N.

Letters: N samples, S shards, C streams, B global batch, e epoch, s stream, j number of a sample in its stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SHARDS, _CUT, _WINDOW = 1, 2, 3
"""Purposes of generators: the order of shards, the split of a shard between two streams, the order in a window."""


@dataclass(frozen=True)
class ShuffleWindow:
    """Samples of one stream that are shuffled together.

    Attributes:
        start: Number j of the first.
        shard, index: int64 [n]: the shard of each sample and its number there, in shuffled order.
        shards: Shards that the window covers.
    """

    epoch: int
    start: int
    shard: np.ndarray
    index: np.ndarray
    shards: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + len(self.shard)


class Order:
    """The order of samples.

    Args:
        counts: Number of samples of each shard; at least one sample in all.
        seed: Seed of the order.
        global_batch: B, the samples of a step over all processes.
        streams: Maximum number of canonical streams; the number in use also divides B and is at most that of shards.
        window: Samples that are shuffled together, rounded up to whole shards.
    """

    def __init__(self, counts: list[int], *, seed: int, global_batch: int, streams: int, window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        self.seed, self.global_batch, self.window = seed, global_batch, window
        # With more streams than shards, neighboring streams would share a shard and read it twice.
        limit = min(streams, int((self.counts > 0).sum()), global_batch)
        # B / C samples from each stream must be a whole number.
        self.streams = max(c for c in range(1, limit + 1) if global_batch % c == 0)
        self.per_stream = global_batch // self.streams
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._plans: dict[int, tuple[int, int, list[tuple[int, list[tuple[int, int, int]]]]]] = {}
        self._windows: dict[int, list[ShuffleWindow]] = {}

    def epoch(self, step: int) -> int:
        """Number of epochs that are complete when this step begins."""
        return step * self.global_batch // self.total

    def take(self, stream: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples start .. start + count - 1 of a stream: (shard, index in the shard), int64 [count] each."""
        shards, indices = [], []
        while count > 0:
            window = self.window_at(stream, start)
            part = slice(start - window.start, start - window.start + count)
            shards.append(window.shard[part])
            indices.append(window.index[part])
            start += len(shards[-1])
            count -= len(shards[-1])
        return np.concatenate(shards), np.concatenate(indices)

    def window_at(self, stream: int, j: int) -> ShuffleWindow:
        """The window that holds sample j of a stream. The last two windows of each stream are cached."""
        recent = self._windows.setdefault(stream, [])
        for window in recent:
            if window.start <= j < window.stop:
                return window
        # The inverse of floor((e N + s) / C) <= j: the last epoch e in which stream s has begun at or before j.
        epoch = (j * self.streams + self.streams - 1 - stream) // self.total
        begin, pieces_of_windows = self._plan(stream, epoch)
        # Only the offsets of windows are stored; a window can be computed from its number.
        number = int(np.searchsorted([start for start, _ in pieces_of_windows], j - begin, side="right")) - 1
        start, pieces = pieces_of_windows[number]
        window = self._shuffled(stream, epoch, number, begin + start, pieces)
        # Two are cached, because a batch may span the end of one window and the start of the next.
        self._windows[stream] = [*recent[-1:], window]
        return window

    def _plan(self, stream: int, epoch: int) -> tuple[int, list[tuple[int, list[tuple[int, int, int]]]]]:
        """The windows of a stream's span of an epoch: its first j, and for each window (offset, [(shard, from,
        to)])."""
        known = self._plans.get(stream)
        if known and known[0] == epoch:
            return known[1], known[2]
        # Integer arithmetic: with floats the spans of large epochs would overlap or omit samples.
        begins_C = (epoch * self.total + np.arange(self.streams)) // self.streams
        lengths_C = ((epoch + 1) * self.total + np.arange(self.streams)) // self.streams - begins_C
        low = int(lengths_C[:stream].sum())
        high = low + int(lengths_C[stream])
        line_S, edges_S = self._epoch_line(epoch)
        windows: list[tuple[int, list[tuple[int, int, int]]]] = []
        held = self.window
        for at in range(int(np.searchsorted(edges_S, low, side="right")) - 1, len(line_S)):
            first = int(edges_S[at])
            start, stop = max(low, first), min(high, int(edges_S[at + 1]))
            if first >= high:
                break
            if start >= stop:
                continue
            # Windows are whole shards, so that a shard is opened once an epoch, however small the window.
            if held >= self.window:
                windows.append((start - low, []))
                held = 0
            windows[-1][1].append((int(line_S[at]), start - first, stop - first))
            held += stop - start
        self._plans[stream] = (epoch, int(begins_C[stream]), windows)
        return int(begins_C[stream]), windows

    def _epoch_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order [S], and the offset of each in the epoch's sequence of samples [S + 1]."""
        if epoch not in self._epochs:
            line_S = self._rng(_SHARDS, epoch).permutation(len(self.counts))
            edges_S = np.concatenate([[0], np.cumsum(self.counts[line_S])])
            # Streams are at most one epoch apart.
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = (line_S, edges_S)
        return self._epochs[epoch]

    def _shuffled(
        self, stream: int, epoch: int, number: int, start: int, pieces: list[tuple[int, int, int]]
    ) -> ShuffleWindow:
        shards, indices = [], []
        for shard, low, high in pieces:
            count = int(self.counts[shard])
            # Two streams that share a shard divide a permutation of it, so that neither always reads its first samples.
            is_full = high - low == count
            line = np.arange(count) if is_full else self._rng(_CUT, epoch, shard).permutation(count)[low:high]
            indices.append(line)
            shards.append(np.full(len(line), shard))
        order = self._rng(_WINDOW, epoch, stream, number).permutation(sum(len(part) for part in indices))
        return ShuffleWindow(
            epoch=epoch,
            start=start,
            shard=np.concatenate(shards)[order],
            index=np.concatenate(indices)[order],
            shards=tuple(shard for shard, _, _ in pieces),
        )

    def _rng(self, *keys: int) -> np.random.Generator:
        # One generator per purpose and position, so that no draw depends on earlier draws.
        return np.random.default_rng([self.seed, *keys])
