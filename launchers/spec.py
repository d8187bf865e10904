"""What a job is: `JobSpec`, a JSON file that names a module and a resolved config.

Jobs are not pickled: every launcher runs `python -m fine_dist.worker JOB.json`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from fine_dist.core.config import Config, validate
from fine_dist.core.errors import LaunchError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import read_json
from fine_dist.core.settings import Variables

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")
MAX_NAME = 120
"""Maximum length of a task name in characters: several file names are derived from it."""


def check_name(name: str) -> str:
    """Return `name` if it can be a file name on every system.

    Raises:
        ValueError: The name is empty, too long, or holds a character that is not portable.
    """
    if not _NAME.match(name) or len(name) > MAX_NAME:
        raise ValueError(f"a task name is 1-{MAX_NAME} letters, digits or . _ = + - (got {name!r})")
    return name


class JobSpec(Config):
    """One job: what it runs, where it writes and which resources it needs. It is the same for every launcher."""

    name: str
    """Name of the job, unique within its run directory."""
    module: str
    """Importable module with `run(config)`, such as `fine_dist.condense`."""
    config: str
    """Path of the resolved config (YAML)."""
    run_dir: str
    """Run directory of the job; logs go to its `logs/`."""
    cwd: str
    """Working directory; relative paths of the config are relative to it."""
    code: str | None = None
    """Folder with the copy of the code that was made at submission. None runs the installed package."""
    table: str | None = None
    """Run directory whose state table has a row for this job. None: the job is in no table."""
    tasks: tuple[str, ...] = ()
    """Rows of that table which this job works on; a pack of targets has several. Empty: one row, `name`."""
    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    processes_per_node: int = Field(1, ge=1)
    """Number of processes on each node."""
    accelerators_per_node: float = Field(0, ge=0)
    """Number of accelerators on each node. With a fraction, several jobs share one (Ray and the local pool)."""
    cpus_per_process: int = Field(1, ge=1)
    """Number of CPU cores for each process."""
    memory_gb: float | None = Field(None, gt=0)
    """Host memory of each node in GiB. None: the cluster's default."""
    minutes: int | None = Field(None, ge=1)
    """Time limit in minutes. None: the cluster's default."""
    env: Variables = Field(default_factory=dict)
    """Environment variables that are set before anything is imported."""
    extras: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Settings of one launcher, by its name: `{"slurm": {"constraint": "a100"}}`."""

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("env")
    @classmethod
    def _variables_have_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not name or "=" in name:
                raise ValueError(f"{name!r} is no name of an environment variable")
        return env

    @property
    def world_size(self) -> int:
        """Number of processes over all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of the state table that this job works on."""
        return self.tasks or (self.name,)

    def save(self, path: str | Path, *, durable: bool = True) -> Path:
        """Write the job as JSON, atomically.

        Args:
            path: File to write.
            durable: Whether the file is synced; a caller that writes many syncs them together.
        """
        return write_atomic(path, self.model_dump_json(indent=1) + "\n", durable=durable)

    @classmethod
    def load(cls, path: str | Path) -> JobSpec:
        """Read what `save` wrote.

        Raises:
            LaunchError: The file is missing, or is not a JSON object.
            ConfigError: A key is unknown or has an illegal value.
        """
        # A job may wait for days, so the file may be of an earlier version or of another machine.
        remedy = "submit again to have it written anew"
        try:
            values = read_json(path, LaunchError, remedy)
        except FileNotFoundError as error:
            raise LaunchError(f"job file {path}: {error.strerror}; is the run directory shared by all nodes?") from None
        if not isinstance(values, dict):
            raise LaunchError(f"job file {path} holds no JSON object; {remedy}")
        return validate(cls, values, str(path))


@dataclass(frozen=True)
class Capacity:
    """The resources of a launcher's machines, for which a fan-out is planned. They may differ from this machine's."""

    workers: int
    """Number of the fan-out's tasks that run at the same time, over all machines."""
    accelerator_bytes: float | None
    """Memory of one accelerator in bytes. None: unknown on this machine, or there is no accelerator."""
    cpu: bool
    """Whether tasks compute on the CPU: they request no accelerator, or there is none."""
    host_bytes: float | None
    """Host memory of one task in bytes. None: unknown on this machine."""


class Task(NamedTuple):
    """One task of a fan-out; a module's `tasks(config)` or `tasks(config, capacity)` returns a list of them."""

    name: str
    """Name, unique within the fan-out; file names are derived from it."""
    config: Config
    """Config with which the module's `run` is called."""
    rows: tuple[str, ...] = ()
    """Rows of the state table that a pack works on. Empty: one row, `name`."""
    complete: tuple[str, ...] | None = None
    """The rows whose results on disk are complete for this config, such as those trained for `steps`. None: the module
    does not check this, and rows with the state `done` count as complete."""


class Finding(NamedTuple):
    """One result of the preflight."""

    what: str
    """Subject: `memory`, `disk`, `slurm`, ..."""
    level: Literal["ok", "note", "stop"]
    """`stop`: the job cannot work. `note`: the check was not conclusive, or its result is worth knowing."""
    text: str
    """What was measured or estimated; for a `stop`, also the remedy."""
