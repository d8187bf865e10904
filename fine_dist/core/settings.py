"""Settings of a job: what it needs of a machine, and how the launchers run it. Read without torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fine_dist.core.config import Config, Text


def _check_names(env: dict[str, str]) -> dict[str, str]:
    for name in env:
        if not re.fullmatch(r"[^=\s]+", name):
            raise ValueError(f"{name!r} is no name of an environment variable: = and spaces are not legal in one")
    return env


Variables = Annotated[dict[str, Text], AfterValidator(_check_names)]
"""Environment variables by name."""


class LaunchConfig(Config):
    """What a job needs and how the launchers run it. Nothing here changes results."""

    nodes: int = Field(1, ge=1, le=100_000)
    """Number of nodes that one job takes; raise it when one node does not hold enough accelerators or memory."""
    processes: int = Field(1, ge=1, le=4_096)
    """Processes on each node; the usual number is one for each accelerator."""
    gpus: float = Field(0, ge=0, le=4_096)
    """Accelerators for each process; 0 computes on the CPU, a fraction shares one between tasks (Ray, local)."""
    cpus: int = Field(1, ge=1, le=4_096)
    """CPU cores for each process, reserved with the scheduler; threads and readers should fit into them."""
    memory_gb: float | None = Field(None, gt=0)
    """Host memory that a job reserves on each node, in GiB; none leaves it to the cluster's default."""
    minutes: int | None = Field(None, ge=1, le=1_000_000)
    """Time limit of a job, or of one task of a fan-out, in minutes; none leaves it to the cluster's default."""
    max_parallel: int | None = Field(None, ge=1, le=100_000)
    """Tasks of a fan-out that run at the same time, at most; none runs as many as fit."""
    retries: int = Field(1, ge=0, le=1_000)
    """Further attempts for a task, or for a Ray worker group, that failed or was lost with its node."""
    max_restarts: int = Field(20, ge=0, le=100_000)
    """How often SLURM may restart a job after preemption, a time limit or a lost node."""
    wait: bool = False
    """Wait until a submitted job has ended and exit with its code (SLURM, Ray Jobs); otherwise return at once."""
    snapshot: bool = True
    """Run submitted jobs from a copy of the code as it is now, so that later edits do not change them."""
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    """What a submission does when `fine-dist plan` finds that the job cannot work: refuse it, warn, or not look."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of one accelerator where the job will run, in GiB, for the preflight; none: this machine's, if local."""
    partition: str | None = None
    """SLURM partition that jobs are submitted to; none leaves it to the cluster's default."""
    account: str | None = None
    """SLURM account that jobs are charged to; none leaves it to the user's default."""
    address: str | None = None
    """Ray cluster: `auto`, HOST:PORT or ray://HOST:10001 to connect, http://HOST:8265 to submit a Ray job; none takes
    RAY_ADDRESS."""
    env: Variables = Field(default_factory=dict)
    """Environment variables that are set in every process before anything is imported."""
    slurm: dict[str, Text] = Field(default_factory=dict)
    """Further sbatch options by their long names, such as `constraint`, `qos` or `exclude`."""
    ray: dict[str, Text] = Field(default_factory=dict)
    """Further Ray resources that each process needs, such as `{"highmem": "1"}`."""
