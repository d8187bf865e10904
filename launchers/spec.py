"""What a job is: `JobSpec`, a JSON file that names a module and a resolved config. No live object travels to a cluster.

Every launcher ends in `python -m fine_dist.worker JOB.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from fine_dist.core.config import Config, validate
from fine_dist.core.errors import LaunchError
from fine_dist.core.files import write_atomic

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")
MAX_NAME = 120
"""Characters: a name becomes several file names."""


def check_name(name: str) -> str:
    """`name` when it can be a file name on every system; `ValueError` otherwise."""
    if not _NAME.match(name) or len(name) > MAX_NAME:
        raise ValueError(f"a task name is 1-{MAX_NAME} letters, digits or . _ = + - (got {name!r})")
    return name


class JobSpec(Config):
    """One job, complete: what runs, where it writes and what it needs. Frozen, JSON, the same on every launcher."""

    name: str
    """Name of the job, unique within its run directory."""
    module: str
    """Importable module with `run(config)`, such as `fine_dist.condense`."""
    config: str
    """Path of the resolved config (YAML)."""
    run_dir: str
    """Run directory; logs go to its `logs/`."""
    cwd: str
    """Directory that relative paths in the config are relative to."""
    code: str | None = None
    """Folder that holds the code as it was when submitted; none: what is installed."""
    table: str | None = None
    """Run directory whose state table has a row for this job; none: no row."""
    tasks: tuple[str, ...] = ()
    """Rows of that table this job works on (a pack has several); empty: one row, `name`."""
    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    processes_per_node: int = Field(1, ge=1)
    """Processes a node."""
    accelerators_per_node: float = Field(0, ge=0)
    """Accelerators a node; a fraction shares one (Ray, and a local pool)."""
    cpus_per_process: int = Field(1, ge=1)
    """CPU cores a process."""
    memory_gb: float | None = Field(None, gt=0)
    """Host memory a node, in GiB; none: the cluster's default."""
    minutes: int | None = Field(None, ge=1)
    """Time limit; none: the cluster's default."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables set before anything is imported."""
    extras: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of one launcher, by its name: `{"slurm": {"constraint": "a100"}}`."""

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        return check_name(name)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.nodes * self.processes_per_node

    @property
    def rows(self) -> tuple[str, ...]:
        """Rows of the state table this job works on."""
        return self.tasks or (self.name,)

    def save(self, path: str | Path, *, durable: bool = True) -> Path:
        """Write JSON, atomically; not `durable`: the caller syncs many at once."""
        return write_atomic(path, self.model_dump_json(indent=1) + "\n", durable=durable)

    @classmethod
    def load(cls, path: str | Path) -> JobSpec:
        """Read what `save` wrote. `LaunchError` when it is missing or not a job."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise LaunchError(f"job file {path}: {error.strerror}; is the run directory shared by all nodes?") from None
        except json.JSONDecodeError as error:
            raise LaunchError(f"job file {path} is not JSON: {error}") from None
        return validate(cls, values, str(path))


@dataclass(frozen=True)
class Capacity:
    """The machines that a launcher's jobs get: what a fan-out is planned for, wherever the command is typed."""

    workers: int
    """Tasks such as these that run at once, over all machines."""
    accelerator_bytes: float | None
    """Memory of one accelerator; none: not known from here, or there is none."""
    cpu: bool
    """Whether tasks compute on the CPU: none asks for an accelerator, or there is none."""
    host_bytes: float | None
    """Host memory of one task; none: not known from here."""


class Task(NamedTuple):
    """One task of a fan-out: what a module's `tasks(config)` or `tasks(config, capacity)` returns a list of."""

    name: str
    """Unique in the fan-out; becomes file names."""
    config: Config
    """What the module's `run` is called with; its `run_dir` is the task's own."""
    rows: tuple[str, ...] = ()
    """Names of the rows a pack works on; empty: one row, `name`."""


class Finding(NamedTuple):
    """One thing that the preflight looked at."""

    what: str
    """`memory`, `disk`, `slurm`, ..."""
    level: Literal["ok", "note", "stop"]
    """`stop`: it cannot work; `note`: it could not be decided, or is worth knowing."""
    text: str
    """What was found and, for a `stop`, the remedy."""
