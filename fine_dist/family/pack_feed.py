"""What the jobs of a pack are trained on: jobs of one data set, seed and step share a feed, read and drawn once.

Shapes: F feeds, B samples of a job on this process, C channels, H latent side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import DataError
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream
from fine_dist.diffusion.objective import NoisedBatch, Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.dist import World
from fine_dist.family.pack_model import Inputs
from fine_dist.model.arch import Arch


@dataclass(frozen=True)
class Source:
    """Where a feed comes from: one data set in the order of one seed, from a step on."""

    domain: str
    data: DataConfig
    seed: int
    step: int
    num_classes: int


@dataclass(frozen=True)
class Fed:
    """A step's questions of F feeds, stacked: every tensor of it is [F, B, ...]."""

    question: NoisedBatch
    rows: dict[int, int]
    """Place in the tensors of a feed that was asked for."""

    @property
    def inputs(self) -> Inputs:
        """What a pack sees of it."""
        return Inputs(self.question.z_t, self.question.t, self.question.y)

    def of(self, rows: Sequence[int], part: slice = slice(None)) -> NoisedBatch:
        """What some rows ask (one a job, in that order), a part of their samples, behind one another [N, ...]."""
        at = list(rows)
        return NoisedBatch(*(x[at, part].flatten(0, 1) for x in _tensors(self.question)))


def _tensors(question: NoisedBatch) -> tuple[Tensor, ...]:
    return question.z, question.z_t, question.eps, question.t, question.y


class Feeds:
    """Opens a stream for every source; `next(wanted)` gives one step of some of them.

    On a GPU the next step is read and drawn by a thread while this one computes. Draws depend on (seed, step, position)
    alone, so a job sees here what it would see by itself.
    """

    def __init__(
        self, sources: Sequence[Source], arch: Arch, batch: int, diffusion: DiffusionConfig, world: World
    ) -> None:
        self.sources, self.world = list(sources), world
        self._objectives = [
            Objective(diffusion, arch, s.seed, num_classes=s.num_classes, ahead=False) for s in self.sources
        ]
        self.bad: dict[int, str] = {}
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
        ahead = world.device is not None and world.device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feeds") if ahead else None
        self._next: tuple[tuple[int, ...], Future[Fed | None]] | None = None

    def next(self, wanted: Sequence[int]) -> Fed | None:
        """One more step of these feeds, in host memory or on the GPU; none when all of them are bad.

        A feed that is left out once must not be asked for again: its place would be lost.
        """
        names = tuple(sorted(set(wanted)))
        if self._pool is None:
            return self._make(names)
        planned, future = self._next or ((), None)
        fed = future.result() if future is not None else self._make(names)
        if planned != names and future is not None and fed is not None:
            fed = _select(fed, names)
        good = tuple(name for name in names if name not in self.bad)
        self._next = (good, self._pool.submit(self._make, good))
        return fed

    def _make(self, names: tuple[int, ...]) -> Fed | None:
        device = self.world.device or torch.device("cpu")
        questions: list[NoisedBatch] = []
        rows: dict[int, int] = {}
        for name in names:
            if name in self.bad:
                continue
            try:
                batch = next(self._batches[name])
            except DataError as error:
                self.bad[name] = str(error)
                continue
            rows[name] = len(questions)
            questions.append(self._objectives[name].sample_noise(batch.to(device)))
        if not questions:
            return None
        return Fed(NoisedBatch(*(torch.stack(parts) for parts in zip(*map(_tensors, questions)))), rows)

    def close(self) -> None:
        """Stop reading."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for stream in self._streams:
            if stream is not None:
                stream.close()


def _select(fed: Fed, names: tuple[int, ...]) -> Fed:
    """The part of a step that was read ahead for more feeds than are wanted now."""
    kept = [name for name in names if name in fed.rows]
    at = [fed.rows[name] for name in kept]
    return Fed(NoisedBatch(*(x[at] for x in _tensors(fed.question))), {name: i for i, name in enumerate(kept)})
