"""Which jobs share a pack, and how many of them go through the model at once. No torch: `--dry-run` shows the plan.

Shapes: J jobs, B samples a job, T tokens, D width, R rank, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from fine_dist.config import Config
from fine_dist.model.zoo import KINDS, Arch


class EarlyStop(Config):
    """Ends a job whose training loss no longer falls."""

    window: int = Field(100, ge=1)
    """Steps whose mean loss is compared with the mean of as many steps before them."""
    min_gain: float = Field(0.0, ge=0, lt=1)
    """Relative fall of that mean below which the job stops."""


class PackConfig(Config):
    """How jobs are packed. Nothing here changes what a job computes, beyond rounding."""

    workers: int | None = Field(None, ge=1)
    """Workers over which the packs are spread; none: launch.max_parallel, else as many as fit on this machine."""
    max_jobs: int = Field(64, ge=1)
    """Jobs of a pack at most."""
    chunk: int | None = Field(None, ge=1)
    """Jobs that go through the model at once; none: as many as memory and cache are good for."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory for activations; none: most of what the accelerator has free, 4 GiB on a CPU."""


@dataclass(frozen=True)
class Shape:
    """What the planner must know of a job."""

    name: str
    arch: Arch
    kin: str
    """Jobs of different kin never share a pack: another method, data shape or set of classes."""
    steps: int


@dataclass(frozen=True)
class Pack:
    """Some jobs, deepest first, and how many of them go through the model at once."""

    jobs: tuple[str, ...]
    chunk: int
    layer_steps: int
    """Layers times steps over all jobs: what its time is proportional to."""

    @property
    def name(self) -> str:
        first = self.jobs[0]
        return first if len(self.jobs) == 1 else f"pack-{first}-and-{len(self.jobs) - 1}-more"


CACHE_NUMBERS = 2**17
"""On a CPU, numbers of one activation [J B, T, D] beyond which a larger chunk only leaves the cache."""


def plan(
    jobs: Sequence[Shape], config: PackConfig, *, workers: int, batch: int, rank: int | None, memory: int, cpu: bool
) -> list[Pack]:
    """Packs, the longest first, that keep `workers` workers equally busy.

    memory: bytes for activations.  cpu: chunks are also kept within the cache.

    Jobs of one kin are dealt out longest first, each to the pack with the least to do (LPT).
    """
    packs: list[Pack] = []
    kins = {shape.kin: [s for s in jobs if s.kin == shape.kin] for shape in jobs}
    total = sum(_work(s) for s in jobs)
    for group in kins.values():
        work = sum(_work(s) for s in group)
        count = max(math.ceil(len(group) / config.max_jobs), round(workers * work / total), 1)
        bins: list[list[Shape]] = [[] for _ in range(min(count, len(group)))]
        for shape in sorted(group, key=lambda s: (-_work(s), s.name)):
            open_bins = [b for b in bins if len(b) < config.max_jobs]
            min(open_bins, key=lambda b: sum(_work(s) for s in b)).append(shape)
        for members in bins:
            members.sort(key=lambda s: (-s.arch.num_layers, s.name))
            chunk = config.chunk or chunk_size(members[0].arch, len(members), batch, rank, memory, cpu=cpu)
            packs.append(Pack(tuple(s.name for s in members), min(chunk, len(members)), sum(map(_work, members))))
    return sorted(packs, key=lambda p: (-p.layer_steps, p.jobs))


def _work(shape: Shape) -> int:
    return shape.arch.num_layers * shape.steps


def chunk_size(deepest: Arch, jobs: int, batch: int, rank: int | None, memory: int, *, cpu: bool) -> int:
    """Jobs at once: what fits into memory and, on a CPU, into the cache; one at least."""
    fits = memory // max(1, batch * activation_bytes(deepest, rank))
    if cpu:
        fits = min(fits, CACHE_NUMBERS // (batch * deepest.num_tokens * deepest.hidden_size))
    return max(1, min(jobs, fits))


def activation_bytes(arch: Arch, rank: int | None, *, bytes_each: int = 4) -> int:
    """Bytes that one sample keeps for the backward pass of a sigma-only step."""
    d, t, r = arch.hidden_size, arch.num_tokens, rank or arch.hidden_size
    # a token's: two normalisations and their inputs, q k v, attention and its output for `o`, the MLP's inside twice,
    # two residual branches, and three products with V
    token = 4 * d + 3 * d + 2 * d + 8 * d + 2 * d + 3 * r
    sample = 6 * d + 2 * d + r + arch.num_heads * t
    return arch.num_layers * (t * token + sample) * bytes_each


def state_numbers(arch: Arch, rank: int | None) -> int:
    """Numbers of a job's sigma."""
    return arch.num_layers * len(KINDS) * (rank or arch.hidden_size)
