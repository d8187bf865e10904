"""Which jobs share a pack, and how many of them go through the model at once. No torch: `--dry-run` shows the plan.

Shapes: J jobs, B samples a job, T tokens, D width, R rank, L layers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from fine_dist.core.config import Config
from fine_dist.model.arch import Arch


class EarlyStop(Config):
    """Ends a job whose training loss no longer falls."""

    window: int = Field(100, ge=1)
    """Steps whose mean loss is compared with the mean of as many steps before them; it is compared once in so many
    steps. A window that is too short stops on noise."""
    min_gain: float = Field(0.0, ge=0, lt=1)
    """Relative fall of that mean below which the job stops. Default: it stops when the mean rises."""


class PackConfig(Config):
    """How jobs are packed. Nothing here changes what a job computes, apart from rounding."""

    workers: int | None = Field(None, ge=1, le=4_096)
    """Workers over which the packs are spread. Default: launch.max_parallel, or else as many as fit where they run."""
    max_jobs: int = Field(64, ge=1, le=4_096)
    """Largest number of jobs in a pack. More share more; fewer lose less when a process dies."""
    chunk: int | None = Field(None, ge=1, le=4_096)
    """Jobs that go through the model at once. Default: as many as memory holds and the device gains from."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory for activations, in GiB. Default: most of what the accelerator has free, or 4 GiB on a CPU."""


@dataclass(frozen=True)
class Shape:
    """What the planner must know of a job."""

    name: str
    arch: Arch
    group: str
    """Jobs of different groups never share a pack: another method, data shape or set of classes."""
    steps: int
    sample_bytes: int
    """Bytes that one sample keeps for the backward pass."""
    feed: str = ""
    """Jobs of one feed see the same samples and draws, which a pack makes once."""


@dataclass(frozen=True)
class Pack:
    """Some jobs, deepest first, and how many of them go through the model at once."""

    jobs: tuple[str, ...]
    chunk: int
    layer_steps: int
    """Layers times steps over all jobs: what its time is proportional to."""
    sequential: bool = False
    """Its jobs train one after the other in its process, because a step of them all would share nothing."""

    @property
    def name(self) -> str:
        first = self.jobs[0]
        return first if len(self.jobs) == 1 else f"pack-{first}-and-{len(self.jobs) - 1}-more"


CACHE_NUMBERS = 2**17
"""On a CPU, numbers of one activation [J B, T, D] beyond which a larger chunk only leaves the cache. A job that fills
it by itself shares no product with others; all that a pack can save it then is the making of its samples."""
GPU_NUMBERS = 2**24
"""The same on a GPU: an activation of 64 samples of DiT-XL/2. Kernels of that size fill the device by themselves, so a
larger chunk runs no faster and only takes memory."""


def plan(jobs: Sequence[Shape], config: PackConfig, *, workers: int, batch: int, memory: int, cpu: bool) -> list[Pack]:
    """Packs, the longest first, that keep `workers` workers equally busy.

    Jobs of one group are dealt out longest first, each to the pack with the least to do (LPT).

    Args:
        memory: Bytes for activations.
        cpu: Chunks are also kept within the cache.
    """
    packs: list[Pack] = []
    groups: dict[str, list[Shape]] = {}
    for shape in jobs:
        groups.setdefault(shape.group, []).append(shape)
    total = sum(_work(s) for s in jobs)
    for group in groups.values():
        work = sum(_work(s) for s in group)
        count = max(math.ceil(len(group) / config.max_jobs), round(workers * work / total), 1)
        for members in _deal(group, min(count, len(group)), config.max_jobs):
            members.sort(key=lambda s: (-s.arch.num_layers, s.name))
            chunk = config.chunk or chunk_size(members[0], len(members), batch, memory, cpu=cpu)
            chunk = min(chunk, len(members))
            shares_no_data = len({s.feed for s in members}) == len(members)
            sequential = config.chunk is None and chunk == 1 < len(members) and shares_no_data
            packs.append(Pack(tuple(s.name for s in members), chunk, sum(map(_work, members)), sequential))
    return sorted(packs, key=lambda p: (-p.layer_steps, p.jobs))


def _deal(jobs: Sequence[Shape], count: int, most: int) -> list[list[Shape]]:
    """`count` parts of at most `most` jobs: longest first, each to the part with the least work, the first of equals.

    J jobs are dealt in J log(count): a full part leaves the heap.
    """
    parts: list[list[Shape]] = [[] for _ in range(count)]
    not_full = [(0, index) for index in range(count)]
    for shape in sorted(jobs, key=lambda s: (-_work(s), s.name)):
        work, index = heapq.heappop(not_full)
        parts[index].append(shape)
        if len(parts[index]) < most:
            heapq.heappush(not_full, (work + _work(shape), index))
    return parts


def _work(shape: Shape) -> int:
    return shape.arch.num_layers * shape.steps


def chunk_size(deepest: Shape, jobs: int, batch: int, memory: int, *, cpu: bool) -> int:
    """Jobs at once: what fits into memory and fills a GPU, or stays in a CPU's cache; one at least."""
    fits = memory // max(1, batch * deepest.sample_bytes)
    one = batch * deepest.arch.num_tokens * deepest.arch.hidden_size
    return max(1, min(jobs, fits, CACHE_NUMBERS // one if cpu else math.ceil(GPU_NUMBERS / one)))


def sample_bytes(arch: Arch, rank: int, *, bf16: bool = False) -> int:
    """Bytes that one sample keeps for the backward pass of a step that trains scalers alone.

    bf16: products and what they keep take two bytes a number; the residual stream and its norms stay in fp32.
    """
    d, t = arch.hidden_size, arch.num_tokens
    size = 2 if bf16 else 4
    # a token's, in fp32: the residual stream before each half, its normalized form, and what each half adds
    stream = 6 * d
    # in the products' precision: q k v and attention's result, the MLP's inside, and four products with V (or the
    # inputs of the products, where W is composed)
    products = 3 * d + d + 4 * d + max(4 * rank, 6 * d)
    sample = 12 * d + rank + arch.num_heads * t
    return arch.num_layers * (t * (stream * 4 + products * size) + sample * 4)
