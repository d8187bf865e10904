"""Plans which jobs share a pack, and how many go through the model at once. Torch is not imported, for `--dry-run`.

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
    """Number of steps whose mean loss is compared with the mean of the same number of steps before them, once in every
    window. A window that is too short stops on noise."""
    min_gain: float = Field(0.0, ge=0, lt=1)
    """Relative decrease of the mean loss below which the job stops. Default: it stops when the mean rises."""


class PackConfig(Config):
    """How jobs are packed. These settings change no job's result, apart from rounding."""

    workers: int | None = Field(None, ge=1, le=4_096)
    """Number of workers over which the packs are spread. Default: launch.max_parallel, otherwise as many as fit on the
    machines of the launcher."""
    max_jobs: int = Field(64, ge=1, le=4_096)
    """Maximum number of jobs in a pack. Larger packs share more work; smaller packs lose less when a process dies."""
    chunk: int | None = Field(None, ge=1, le=4_096)
    """Number of jobs that go through the model at once. Default: limited by memory and by what speeds up the device."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory for activations, in GiB. Default: 80% of the accelerator's free memory, or 4 GiB on a CPU."""


@dataclass(frozen=True)
class Shape:
    """The properties of a job that the planner uses."""

    name: str
    arch: Arch
    group: str
    """Jobs of different groups never share a pack: they differ in method, data shape or classes."""
    steps: int
    sample_bytes: int
    """Bytes saved for the backward pass of one sample."""
    feed: str = ""
    """Jobs of one feed use the same samples and noise, which a pack prepares once."""


@dataclass(frozen=True)
class Pack:
    """Jobs that train together, deepest first, and how many go through the model at once."""

    jobs: tuple[str, ...]
    chunk: int
    layer_steps: int
    """Sum of layers times steps over all jobs, to which the pack's time is proportional."""
    sequential: bool = False
    """Whether the jobs train one after the other in one process, because a joint step would share nothing."""

    @property
    def name(self) -> str:
        first = self.jobs[0]
        return first if len(self.jobs) == 1 else f"pack-{first}-and-{len(self.jobs) - 1}-more"


CACHE_NUMBERS = 2**17
"""On a CPU, size of an activation [J B, T, D] above which a larger chunk no longer fits the cache. If one job reaches
it alone, a pack shares no products and saves only the preparation of samples."""
GPU_NUMBERS = 2**24
"""The same limit on a GPU: an activation of 64 samples of DiT-XL/2. Kernels of that size occupy the complete device, so
a larger chunk is not faster and only takes memory."""


def plan(jobs: Sequence[Shape], config: PackConfig, *, workers: int, batch: int, memory: int, cpu: bool) -> list[Pack]:
    """Divide jobs into packs that keep `workers` workers equally busy.

    Jobs of one group are assigned longest first, each to the pack with the least work (LPT).

    Args:
        jobs: The jobs.
        config: Settings of packs.
        workers: Number of workers.
        batch: Samples of a job in a step of one process.
        memory: Bytes for activations.
        cpu: Whether they run on a CPU, where chunks are kept within the cache.

    Returns:
        The packs, longest first.
    """
    packs: list[Pack] = []
    groups: dict[str, list[Shape]] = {}
    for shape in jobs:
        groups.setdefault(shape.group, []).append(shape)
    total = sum(_work(s) for s in jobs)
    for group in groups.values():
        work = sum(_work(s) for s in group)
        # The group gets its share of the workers by work, but no pack gets more than `max_jobs` jobs.
        count = max(math.ceil(len(group) / config.max_jobs), round(workers * work / total), 1)
        for members in _deal(group, min(count, len(group)), config.max_jobs):
            # Deepest first, as a pack computes them, then by name, so that the plan is deterministic.
            members.sort(key=lambda s: (-s.arch.num_layers, s.name))
            chunk = config.chunk or chunk_size(members[0], len(members), batch, memory, cpu=cpu)
            chunk = min(chunk, len(members))
            shares_no_data = len({s.feed for s in members}) == len(members)
            # One job at a time and no shared data: alternating between jobs would only evict each other's cache lines.
            sequential = config.chunk is None and chunk == 1 < len(members) and shares_no_data
            packs.append(Pack(tuple(s.name for s in members), chunk, sum(map(_work, members)), sequential))
    return sorted(packs, key=lambda p: (-p.layer_steps, p.jobs))


def _deal(jobs: Sequence[Shape], count: int, most: int) -> list[list[Shape]]:
    """Divide jobs into `count` parts of at most `most` jobs: longest first, each to the part with the least work.

    The heap holds the parts that are not full, so J jobs take O(J log count) operations.
    """
    parts: list[list[Shape]] = [[] for _ in range(count)]
    not_full = [(0, index) for index in range(count)]
    # Longest first (LPT): its makespan is at most 4/3 of the best one (Graham 1969).
    for shape in sorted(jobs, key=lambda s: (-_work(s), s.name)):
        work, index = heapq.heappop(not_full)
        parts[index].append(shape)
        if len(parts[index]) < most:
            heapq.heappush(not_full, (work + _work(shape), index))
    return parts


def _work(shape: Shape) -> int:
    return shape.arch.num_layers * shape.steps


def chunk_size(deepest: Shape, jobs: int, batch: int, memory: int, *, cpu: bool) -> int:
    """Number of jobs that go through the model at once, 1 or more: limited by memory, and by the size from which a
    larger chunk is no faster (`CACHE_NUMBERS`, `GPU_NUMBERS`)."""
    fits = memory // max(1, batch * deepest.sample_bytes)
    # Size of one activation of one job.
    one = batch * deepest.arch.num_tokens * deepest.arch.hidden_size
    return max(1, min(jobs, fits, CACHE_NUMBERS // one if cpu else math.ceil(GPU_NUMBERS / one)))


def sample_bytes(arch: Arch, rank: int, *, bf16: bool = False) -> int:
    """Bytes saved for the backward pass of one sample in a step that trains only scalers.

    Args:
        arch: Architecture.
        rank: R.
        bf16: Whether products are in bf16; the residual stream and its norms are fp32 in any case.
    """
    d, t = arch.hidden_size, arch.num_tokens
    size = 2 if bf16 else 4
    # fp32 numbers of a token: the residual stream before each half of a block, its normalized form, each half's update
    stream = 6 * d
    # numbers of a token in the products' precision: q, k, v and attention's result, the MLP's hidden layer, and four
    # products with V (or the inputs of the products if W is composed)
    products = 3 * d + d + 4 * d + max(4 * rank, 6 * d)
    sample = 12 * d + rank + arch.num_heads * t
    return arch.num_layers * (t * (stream * 4 + products * size) + sample * 4)
