"""The training data of a pack: jobs with the same data set, seed and step share a feed, read and noised once.

Shapes: F feeds, B samples of a job on this process, C channels, H latent side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import DataError
from fine_dist.data.batch import Batch, as_float
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream
from fine_dist.diffusion.objective import NoisedBatch
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.random_draws import RandomDraws, draw
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.world import World
from fine_dist.family.index_cache import IndexCache, to_device
from fine_dist.model.arch import Arch


@dataclass(frozen=True)
class FeedSource:
    """Identifies a feed: a data set in the order of a seed, starting at a step."""

    domain: str
    data: DataConfig
    seed: int
    step: int
    num_classes: int


@dataclass(frozen=True)
class FeedBatch:
    """The noised inputs of one step of F feeds, stacked: every tensor is [F, B, ...]."""

    noised: NoisedBatch
    rows: dict[int, int]
    """Feed -> its row in the tensors."""

    def select(self, cache: IndexCache, rows: Sequence[int]) -> FeedBatch:
        """Some rows in a given order, one for each job; the result has no `rows`."""
        return FeedBatch(NoisedBatch(*(cache.take(x, rows) for x in _tensors(self.noised))), {})

    def flat(self, part: slice = slice(None)) -> NoisedBatch:
        """A part of every row's samples, concatenated: every tensor is [F b, ...]."""
        return NoisedBatch(*(x[:, part].flatten(0, 1) for x in _tensors(self.noised)))


def _tensors(noised: NoisedBatch) -> tuple[Tensor, ...]:
    return noised.z, noised.z_t, noised.eps, noised.t, noised.y


class Feeds:
    """Streams of all sources; `next(indices)` returns one step of some of them.

    The feeds of a step are stacked in host memory and copied to the device with one copy for each tensor. On a GPU a
    thread prepares the next step while the current one computes. Random draws depend on (seed, step, position) alone,
    so a job gets the same samples as in a run of its own.
    """

    def __init__(
        self, sources: Sequence[FeedSource], arch: Arch, batch: int, diffusion: DiffusionConfig, world: World
    ) -> None:
        self.sources, self.device = list(sources), world.device or torch.device("cpu")
        self.process = make_process(diffusion).to(self.device)
        # A second process for `times`, which runs in host memory: `self.process` is moved to the device.
        times = make_process(diffusion).times
        self._draws = [
            partial(draw, s.seed, shape=arch.latent_shape, times=times, label_drop=diffusion.label_drop)
            for s in self.sources
        ]
        self.bad: dict[int, str] = {}
        """The reason why a feed can no longer be read, by feed."""
        self._cache = IndexCache()
        self._streams: list[LatentStream | None] = []
        self._batches: list[Iterator[Any]] = []
        for index, source in enumerate(self.sources):
            try:
                stream = LatentStream(
                    source.data,
                    seed=source.seed,
                    global_batch=batch,
                    rank=world.rank,
                    world_size=world.world_size,
                    expect=arch.model_copy(update={"num_classes": source.num_classes}),
                )
            except DataError as error:
                self.bad[index] = str(error)
                self._streams.append(None)
                self._batches.append(iter(()))
                continue
            self._streams.append(stream)
            self._batches.append(stream.batches(source.step))
        # A single thread, because iterators of streams may not be advanced from two threads.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feeds") if self.device.type == "cuda" else None
        self._next: tuple[tuple[int, ...], Future[FeedBatch | None]] | None = None

    def next(self, wanted: Sequence[int]) -> FeedBatch | None:
        """The next step of these feeds, on the device; None when all of them are bad.

        A feed that was left out once must not be requested again, because its position in the stream is lost.
        """
        names = tuple(sorted(set(wanted)))
        if self._pool is None:
            return self._make(names)
        planned, future = self._next or ((), None)
        batch = future.result() if future is not None else self._make(names)
        # If a job ended in between, its feed was prefetched and is left out of this step.
        if planned != names and batch is not None:
            still_wanted = [name for name in names if name in batch.rows]
            rows = [batch.rows[name] for name in still_wanted]
            batch = (
                FeedBatch(batch.select(self._cache, rows).noised, {n: i for i, n in enumerate(still_wanted)})
                if rows
                else None
            )
        good = tuple(name for name in names if name not in self.bad)
        # Submitted before the caller computes, so that reading and computing overlap.
        self._next = (good, self._pool.submit(self._make, good))
        return batch

    def _make(self, names: tuple[int, ...]) -> FeedBatch | None:
        batches: list[Batch] = []
        draws: list[RandomDraws] = []
        labels: list[Tensor] = []
        rows: dict[int, int] = {}
        for name in names:
            if name in self.bad:
                continue
            try:
                batch = next(self._batches[name])
            except DataError as error:
                self.bad[name] = str(error)
                continue
            rows[name] = len(batches)
            batches.append(batch)
            draws.append(self._draws[name](batch.step, batch.positions))
            labels.append(torch.where(draws[-1].drop, self.sources[name].num_classes, batch.labels))
        if not batches:
            return None
        z = self._latents(batches)
        t, eps = (self._stacked([getattr(d, name) for d in draws]) for name in ("t", "noise"))
        z_t = self.process.add_noise(z.flatten(0, 1), t.flatten(), eps.flatten(0, 1)).unflatten(0, z.shape[:2])
        return FeedBatch(NoisedBatch(z, z_t, eps, t, self._stacked(labels)), rows)

    def _latents(self, batches: list[Batch]) -> Tensor:
        """float32 [F, B, C, H, W]."""
        # If all feeds store one dtype and scale, the stored numbers are copied and converted on the device: float16
        # halves the bytes to copy.
        kinds = {(batch.stored.dtype, batch.scale, batch.shift) for batch in batches}
        if len(kinds) == 1:
            return as_float(self._stacked([batch.stored for batch in batches]), batches[0].scale, batches[0].shift)
        return self._stacked([batch.latents for batch in batches])

    def _stacked(self, parts: list[Tensor]) -> Tensor:
        return to_device(torch.stack(parts), self.device)

    def close(self) -> None:
        """Stop reading and close all streams."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for stream in self._streams:
            if stream is not None:
                stream.close()
