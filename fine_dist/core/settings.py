"""Settings of a job: what it needs of a machine, and how the launchers run it. Read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.core.config import Config


class LaunchConfig(Config):
    """What a job needs and how the launchers run it. Nothing here changes results."""

    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    processes: int = Field(1, ge=1)
    """Processes a node; one an accelerator is usual."""
    gpus: float = Field(0, ge=0)
    """Accelerators a process; a fraction lets tasks of a fan-out share one (Ray, local)."""
    cpus: int = Field(1, ge=1)
    """CPU cores a process."""
    memory_gb: float | None = Field(None, gt=0)
    """Host memory a node, in GiB; none: the cluster's default."""
    minutes: int | None = Field(None, ge=1)
    """Time limit of a job (of one task, in a fan-out); none: the cluster's default."""
    max_parallel: int | None = Field(None, ge=1)
    """Tasks of a fan-out that run at once; none: as many as fit."""
    retries: int = Field(1, ge=0)
    """Further attempts for a task or a Ray worker group that was lost or failed."""
    max_restarts: int = Field(20, ge=0)
    """Times that SLURM may start a job again after preemption, a time limit or a lost node."""
    wait: bool = False
    """Stay until a submitted job has ended, and exit with its code (SLURM; Ray Jobs)."""
    snapshot: bool = True
    """Submitted jobs run a copy of the code as it is now, whatever changes before they start."""
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    """What a submission does when the preflight (`fine_dist.plan`) finds that it cannot work."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of one accelerator where the job will run, in GiB, for the preflight; none: this machine's, when local."""
    partition: str | None = None
    """SLURM partition; none: the cluster's default."""
    account: str | None = None
    """SLURM account; none: the user's default."""
    address: str | None = None
    """Ray: `auto`, HOST:PORT or ray://HOST:10001 to connect, http://HOST:8265 for a Ray job; none: RAY_ADDRESS."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every process."""
    slurm: dict[str, str] = Field(default_factory=dict)
    """Further sbatch options by their long names: `constraint`, `qos`, `exclude`."""
    ray: dict[str, str] = Field(default_factory=dict)
    """Further Ray resources a process needs: `{"highmem": "1"}`."""
