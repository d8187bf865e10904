"""Latents as an endless, seeded sequence of batches.

    stream = LatentStream(config, seed=0, global_batch=256, rank=rank, world_size=world_size)
    for batch in stream.batches(start_step):      # the step is the only state
        ...

The order of samples depends on (shards, seed, global batch, streams, window) and on nothing else (`order.py`). A
process reads only the positions of the global batch that are its own: rank r of W has r B/W .. (r + 1) B/W.

Letters: B samples of this process in a batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from fine_dist.core.errors import DataError
from fine_dist.data.batch import Batch, as_float, draw_moments
from fine_dist.data.manifest import Manifest
from fine_dist.data.order import Order
from fine_dist.data.reader import Rows, ShardSet
from fine_dist.data.settings import DataConfig
from fine_dist.model.arch import Arch

_PLAN_SAMPLES = 8192
"""Number of samples that are located at once; it changes only speed."""


class LatentStream:
    """The latents of a set of shards, in a seeded order that does not depend on the number of processes or workers.

    Args:
        config: Where the shards are, and how they are streamed.
        seed: Seed of the order, and of the noise of stored moments.
        global_batch: Samples of a step over all processes.
        rank: Number of this process.
        world_size: Number of processes.
        shards: Folder, URL or pattern of the shards. None: `config.shards`.
        expect: Architecture that the latents must fit. None accepts any latents.
        tokens: Whether batches contain the image encoder's tokens that are stored with the latents.

    Attributes:
        manifest: Manifest of the shards.
        waited_s: Seconds that the consumer has waited for batches.
        bad: Number of damaged samples that this process has skipped; each is counted once.

    Raises:
        DataError: There are no shards, they do not fit `expect` or have no tokens, the batch cannot be divided over the
            processes, or (from `batches`) too many samples are damaged.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        shards: str | None = None,
        expect: Arch | None = None,
        tokens: bool = False,
    ) -> None:
        where = shards or config.shards
        if not where:
            raise DataError("no shards: set data.shards to a folder, URL or brace pattern of latent shards")
        if global_batch < 1 or global_batch % world_size:
            near = max(world_size, round(global_batch / world_size) * world_size)
            raise DataError(
                f"a global batch of {global_batch} cannot be divided over {world_size} processes; "
                f"use a multiple of {world_size}, such as {near}"
            )
        self._set = ShardSet(where, config)
        self.manifest: Manifest = self._set.manifest
        if expect is not None:
            check_fit(self.manifest, expect, where)
        if tokens and self.manifest.tokens is None:
            raise DataError(f"{where}: it holds no tokens of an image encoder; encode again with --repa-encoder FOLDER")
        self._tokens = tokens
        self._order = Order(
            [shard.count for shard in self.manifest.shards],
            seed=seed,
            global_batch=global_batch,
            streams=config.streams,
            window=config.window,
        )
        self._seed, self._workers = seed, config.workers
        share = global_batch // world_size
        # Contiguous positions, so that a rank touches as few streams, and opens as few shards, as possible.
        self._low, self._high = rank * share, (rank + 1) * share
        self._positions = torch.arange(self._low, self._high)
        self._lock = threading.Lock()
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        self.waited_s = 0.0

    @property
    def bad(self) -> int:
        return self._set.bad

    @property
    def streams(self) -> int:
        """Number of canonical streams in use (see `Order`)."""
        return self._order.streams

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """An endless iterator of batches from `start_step` on. Starting at a late step is as fast as starting at step
        0."""
        plans = self._plans(start_step)
        if not self._workers:
            for plan in plans:
                started = time.perf_counter()
                batch = self._read(*plan)
                self.waited_s += time.perf_counter() - started
                yield batch
        self._pool = self._pool or ThreadPoolExecutor(self._workers, thread_name_prefix="latents")
        ahead: deque[Future[Batch]] = deque()
        try:
            for plan in plans:
                ahead.append(self._pool.submit(self._read, *plan))
                # Two batches per worker: one is read while the other is ready, which hides variance of single reads.
                if len(ahead) <= 2 * self._workers:
                    continue
                started = time.perf_counter()
                batch = ahead.popleft().result()
                self.waited_s += time.perf_counter() - started
                yield batch
        finally:
            for future in ahead:
                # The caller has stopped iterating, so reads that have not started are not needed.
                future.cancel()

    def close(self) -> None:
        """Stop reading ahead and close all shards; the stream cannot be used afterwards."""
        self._closed = True
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._set.close()

    def __enter__(self) -> LatentStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- what to read ----------------------------------------------------------------------------------------------

    def _plans(self, step: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(step, shard [B], index [B]) of this process's positions, one step after the other."""
        num_steps = max(1, _PLAN_SAMPLES // (self._high - self._low))
        while not self._closed:
            shard, index = self._plan(step, num_steps)
            for i in range(num_steps):
                yield step + i, shard[i], index[i]
            step += num_steps

    def _plan(self, step: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and index [num_steps, B] of this process's positions."""
        per = self._order.per_stream
        shards, indices, ahead = [], [], []
        live: set[int] = set()
        with self._lock:
            # Only the streams of this rank's positions; each stream has B / C consecutive positions.
            for stream in range(self._low // per, -(-self._high // per)):
                start = step * per
                shard, index = self._order.take(stream, start, num_steps * per)
                low, high = max(self._low - stream * per, 0), min(self._high - stream * per, per)
                shards.append(shard.reshape(num_steps, per)[:, low:high])
                indices.append(index.reshape(num_steps, per)[:, low:high])
                last = self._order.window_at(stream, start + num_steps * per - 1)
                live.update(np.unique(shard).tolist(), last.shards)
                ahead.append((stream, last.stop))
            # The next windows are planned as well, so that their shards are opened before a step needs them.
            following = [self._order.window_at(stream, j).shards for stream, j in ahead]
        self._set.keep_open(live, [shard for shards_of in following for shard in shards_of])
        return np.concatenate(shards, 1), np.concatenate(indices, 1)

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self, step: int, shard: np.ndarray, index: np.ndarray) -> Batch:
        rows = self._set.read(shard, index, scaled=True, tokens=self._tokens)
        for row, fault in rows.faults.items():
            self._set.count_bad(int(shard[row]), int(index[row]), fault)
            self._replace(step, row, rows)
        stored, scale, shift = rows.stored, rows.scale, rows.shift
        if self.manifest.kind == "moments":
            # A sample of scaled moments is the scaled sample. The shift changes only the mean.
            if isinstance(scale, tuple) or isinstance(shift, tuple):
                moments = as_float(stored, scale, shift)
            else:
                moments = as_float(stored, scale)
                # `(mean - shift) * scale` for the mean and `std * scale` for the standard deviation.
                moments[:, : self.manifest.latent_shape[0]] -= shift * scale
            stored, scale, shift = draw_moments(moments, self._seed, step, self._low), 1.0, 0.0
        labels = torch.from_numpy(rows.labels)
        return Batch(step, self._order.epoch(step), stored, scale, labels, self._positions, shift, rows.tokens)

    def _replace(self, step: int, row: int, rows: Rows) -> None:
        """Replace a damaged sample by the stream's next good one, independently of the world size and without state."""
        position = self._low + row
        stream, k = divmod(position, self._order.per_stream)
        j = step * self._order.per_stream + k
        for shard, index in self._candidates(stream, j):
            replacement = self._set.read(shard, index, scaled=True, tokens=self._tokens)
            if not replacement.faults:
                rows.stored[row], rows.labels[row] = replacement.stored[0], replacement.labels[0]
                if rows.tokens is not None and replacement.tokens is not None:
                    rows.tokens[row] = replacement.tokens[0]
                return
            self._set.count_bad(int(shard[0]), int(index[0]), replacement.faults[0])
        raise DataError(f"{self._set.base}: no sample of canonical stream {stream} can be read: {rows.faults[row]}")

    def _candidates(self, stream: int, j: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Replacements of sample j: the other samples of its window, cyclically, then the following ones for an
        epoch."""
        with self._lock:
            window = self._order.window_at(stream, j)
        size, at = len(window.shard), j - window.start
        for step in range(1, size):
            i = (at + step) % size
            yield window.shard[i : i + 1], window.index[i : i + 1]
        for later in range(window.stop, window.stop + self._order.total):
            with self._lock:
                yield self._order.take(stream, later, 1)


def check_fit(manifest: Manifest, arch: Arch, where: str) -> None:
    """Check that a model of this architecture can be trained on shards.

    Args:
        manifest: Manifest of the shards.
        arch: The architecture.
        where: Path or URL of the shards, for messages.

    Raises:
        DataError: Latent shapes differ, or there are more classes than the model has.
    """
    if manifest.latent_shape != arch.latent_shape:
        raise DataError(
            f"{where}: latents are {_by(manifest.latent_shape)}, but the model takes {_by(arch.latent_shape)}; "
            "set --arch.in-channels and --arch.input-size, or choose other shards"
        )
    if manifest.num_classes > arch.num_classes:
        raise DataError(
            f"{where}: labels have {manifest.num_classes} classes, but the model has {arch.num_classes}; "
            f"set --arch.num-classes {manifest.num_classes}"
        )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)


def read_all(shards: str, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Read all latents of a small set of shards into memory, in the order of the manifest.

    Args:
        shards: Folder, URL or pattern of the shards.
        limit: Maximum number of samples. A fixed random subset is taken, because shards may be sorted by class.

    Returns:
        (latents, labels): float32 [N, C, H, W], scaled as the manifest says (of moments, the means), and int64 [N].

    Raises:
        DataError: A sample is damaged.
    """
    shard_set = ShardSet(shards, DataConfig())
    manifest = shard_set.manifest
    shard = np.repeat(np.arange(len(manifest.shards)), [info.count for info in manifest.shards])
    index = np.concatenate([np.arange(info.count) for info in manifest.shards])
    if limit is not None and limit < len(shard):
        subset = np.sort(np.random.default_rng(0).permutation(len(shard))[:limit])
        shard, index = shard[subset], index[subset]
    latents, labels = [], []
    for start in range(0, len(shard), _PLAN_SAMPLES):
        part = slice(start, start + _PLAN_SAMPLES)
        rows = shard_set.read(shard[part], index[part], scaled=True)
        for row, fault in rows.faults.items():
            shard_set.count_bad(int(shard[part][row]), int(index[part][row]), fault)
        latents.append(rows.latents[:, : manifest.latent_shape[0]])
        labels.append(torch.from_numpy(rows.labels))
    shard_set.close()
    return torch.cat(latents), torch.cat(labels)
