"""What a job is (`JobSpec`, a JSON file), a grid's points (`expand`), and what became of each task (`StateTable`).

No live object ever travels to a cluster: a job is a JSON file naming a module and a resolved config, and every launcher
ends in `python -m fine_dist.worker JOB.json`.

The state table is one small file a task, `RUN_DIR/tasks/NAME.json`, replaced by an atomic rename, and one lock file a
task. Writers of different tasks never touch the same file, so there is no shared log to corrupt, compact or lock, and
a reader sees either the old row or the new one. Who may run a task is decided by `flock` on its lock file, held for as
long as the task runs: the kernel (or the file server) drops it the moment the process dies, however it dies, so nothing
has to expire and a restarted driver goes on at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from fine_dist.config import Config, validate
from fine_dist.errors import LaunchError, RunDirError

State = Literal["pending", "running", "done", "failed"]
FINAL = ("done", "failed")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$")
MAX_NAME = 120
"""Characters: a name becomes several file names."""


def check_name(name: str) -> str:
    """`name` when it can be a file name on every system; `ValueError` otherwise."""
    if not _NAME.match(name) or len(name) > MAX_NAME:
        raise ValueError(f"a task name is 1-{MAX_NAME} letters, digits or . _ = + - (got {name!r})")
    return name


# --- the job -------------------------------------------------------------------------------------------------------


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

    def save(self, path: str | Path) -> Path:
        """Write JSON, atomically."""
        return write_atomic(Path(path), self.model_dump_json(indent=1) + "\n")

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


class Task(NamedTuple):
    """One task of a fan-out: what a module's `tasks(config)` returns a list of."""

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


class Point(NamedTuple):
    """One point of a grid."""

    name: str
    values: dict[str, Any]


def expand(grid: Mapping[str, Any]) -> list[Point]:
    """All combinations of a grid, the last key fastest.

    grid: dotted config key -> list of values; anything that is no list holds for every point and is not named.

    A point's name is made of what varies: `{"depth": [4, 6], "seed": [0, 1]}` gives `depth4-seed0`, `depth4-seed1`, ...
    Raises `LaunchError` when a list is empty or two points get one name.
    """
    axes = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    varying = [key for key, value in grid.items() if isinstance(value, list)]
    for key in varying:
        if not axes[key]:
            raise LaunchError(f"grid key {key}: an empty list makes no task; give one value or more")
    points = []
    for chosen in itertools.product(*axes.values()):
        values = dict(zip(axes, chosen))
        parts = [f"{key.rpartition('.')[2]}{_slug(values[key])}" for key in varying if len(axes[key]) > 1]
        points.append(Point("-".join(parts) or "task", values))
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LaunchError(f"grid: several points are named {twice[0]!r}; a value is listed twice")
    return points


def _slug(value: Any) -> str:
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", str(value)).strip("_")
    return text if len(text) <= 40 else text[-40:]


# --- the state table -----------------------------------------------------------------------------------------------


class Row(Config):
    """What is known of one task."""

    name: str
    index: int = 0
    """Place in the fan-out."""
    state: State = "pending"
    reason: str | None = None
    """Why it failed."""
    attempts: int = 0
    """Times it was started."""
    host: str | None = None
    """Where it runs or ran last."""
    pid: int | None = None
    job: str | None = None
    """The scheduler's name of the job that ran it."""
    run_dir: str | None = None
    started: float | None = None
    """Unix time of the last start."""
    seconds: float | None = None
    """How long the last attempt took."""


class Claim:
    """The right to run some tasks, held until `release` or the death of this process."""

    def __init__(self, files: list[int]) -> None:
        self._files = files

    def release(self) -> None:
        """Give the tasks back."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class StateTable:
    """The durable table of a fan-out in `RUN_DIR/tasks`. Any process on any host may read; holders of a claim write."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "tasks"

    def add(self, names: Sequence[str], run_dirs: Mapping[str, str] | None = None) -> None:
        """Make a pending row for every name that has none; rows that exist keep their state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            path = self._row_path(name)
            if not path.exists():
                row = Row(name=name, index=index, run_dir=(run_dirs or {}).get(name))
                with contextlib.suppress(FileExistsError):
                    write_new(path, row.model_dump_json() + "\n")

    def rows(self) -> list[Row]:
        """All rows in the order they were added. A task whose process is gone still reads `running`: see `lost`."""
        found = []
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                found.append(self._read(path))
        return sorted(found, key=lambda row: (row.index, row.name))

    def get(self, name: str) -> Row | None:
        """One row, or None."""
        try:
            return self._read(self._row_path(name))
        except FileNotFoundError:
            return None

    def update(self, name: str, **changes: Any) -> Row:
        """Change fields of a row and make it durable. For the holder of the task's claim, and before there is one."""
        row = self.get(name) or Row(name=name)
        row = validate(Row, {**row.model_dump(), **changes}, f"row {name}")
        write_atomic(self._row_path(name), row.model_dump_json() + "\n")
        return row

    def start(self, name: str, job: str | None = None) -> Row:
        """The task starts here and now: one more attempt."""
        row = self.get(name) or Row(name=name)
        here = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        return self.update(
            name, state="running", reason=None, attempts=row.attempts + 1, started=time.time(), seconds=None, **here
        )

    def finish(self, name: str, state: State, reason: str | None = None) -> Row:
        """The attempt is over: `done`, `failed` with its reason, or `pending` again."""
        row = self.get(name) or Row(name=name)
        seconds = time.time() - row.started if row.started else None
        return self.update(name, state=state, reason=reason, seconds=seconds)

    def claim(self, names: Iterable[str], wait_s: float = 2.0) -> Claim | None:
        """The right to run these tasks, all or none; None when another live process has one of them.

        wait_s: seconds to try, because `lost` looks at a lock by taking it for an instant.
        """
        files: list[int] = []
        deadline = time.monotonic() + wait_s
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            file = os.open(self._lock_path(name), os.O_RDWR | os.O_CREAT, 0o666)
            files.append(file)
            while not _try_lock(file, self.folder):
                if time.monotonic() > deadline:
                    Claim(files).release()
                    return None
                time.sleep(0.02)
        return Claim(files)

    def lost(self, row: Row) -> bool:
        """Whether the row says `running` although no live process holds the task."""
        if row.state != "running":
            return False
        try:
            file = os.open(self._lock_path(row.name), os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            return _try_lock(file, self.folder)
        finally:
            os.close(file)

    @contextlib.contextmanager
    def driver(self, what: str) -> Iterator[None]:
        """Held by the process that hands out tasks. `RunDirError` names the other one when there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.folder / ".driver", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(file, self.folder):
                owner = os.read(file, 4096).decode(errors="replace").strip()
                raise RunDirError(
                    f"{self.folder.parent}: another fan-out is handing out its tasks ({owner}); "
                    "wait for it, stop it, or use another run_dir"
                )
            os.ftruncate(file, 0)
            os.write(file, f"{what}, process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            os.close(file)

    def _row_path(self, name: str) -> Path:
        return self.folder / f"{check_name(name)}.json"

    def _lock_path(self, name: str) -> Path:
        return self.folder / f".{check_name(name)}.lock"

    def _read(self, path: Path) -> Row:
        try:
            return Row.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError:
            raise RunDirError(f"{path} is damaged; delete it to have the task run again") from None


class Submissions:
    """What was handed to a scheduler from a run directory: `RUN_DIR/jobs/.submitted`, one file a submission.

    Kept apart from the rows: a scheduler may start a task before the id it was given can be written down.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "jobs" / ".submitted"

    def add(self, jobs: Mapping[str, Sequence[str]]) -> None:
        """Remember which tasks each of the scheduler's jobs was given."""
        if jobs:
            file = re.sub("[^A-Za-z0-9_.-]", "_", next(iter(jobs))) + ".json"
            write_atomic(self.folder / file, json.dumps({job: [*names] for job, names in jobs.items()}) + "\n")

    def all(self) -> dict[str, list[str]]:
        """Scheduler's job -> names of its tasks."""
        found: dict[str, list[str]] = {}
        for path in sorted(self.folder.glob("*.json")):
            found |= json.loads(path.read_text(encoding="utf-8"))
        return found


def _try_lock(file: int, where: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise RunDirError(
            f"{where}: this file system has no working locks ({error.strerror}); mount it with locks "
            "(Lustre: -o flock, NFS: version 4) or use a run_dir on another one"
        ) from None


# --- files ---------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, text: str) -> Path:
    """Write a file so that readers see the old text or the new one, and a power cut keeps one of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path, text)
    os.replace(draft, path)
    return path


def write_new(path: Path, text: str) -> Path:
    """As `write_atomic`, but `FileExistsError` when the file is there already."""
    draft = _draft(path, text)
    try:
        os.link(draft, path)
    finally:
        draft.unlink()
    return path


def _draft(path: Path, text: str) -> Path:
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return draft
