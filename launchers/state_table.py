"""What became of each task of a fan-out (`StateTable`), and what was handed to a scheduler (`Submissions`).

Which tasks there are is said in lists, `RUN_DIR/tasks/.added/HASH.json`, one file for all that were added at once and
never changed after. What became of a task that has started is one small file, `RUN_DIR/tasks/NAME.json`, replaced by an
atomic rename; a task without one is pending. Writers of different tasks never touch the same file, so there is no
shared log to corrupt, compact or lock, and a reader sees either the old row or the new one. Who may run a task is
decided by `flock` on its lock file, held for as long as the task runs: the kernel (or the file server) drops it the
moment the process dies, however it dies, so nothing has to expire and a restarted driver goes on at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fine_dist.core.config import Config, validate
from fine_dist.core.errors import RunDirError
from fine_dist.core.files import sha256_text, try_lock, write_all, write_atomic
from launchers.spec import check_name

State = Literal["pending", "running", "done", "failed"]
FINAL = ("done", "failed")
ADDED = ".added"
"""Folder of the lists of tasks."""


class TaskRow(Config):
    """What is known of one task."""

    name: str
    index: int = 0
    """LaunchTarget in the fan-out."""
    state: State = "pending"
    reason: str | None = None
    """Why it failed."""
    attempts: int = 0
    """Times it was started."""
    deaths: int = 0
    """Attempts that ended without a word: the process was killed, most likely for want of memory."""
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
        self._lists: dict[str, dict[str, TaskRow]] = {}
        """What each list says; lists never change, so each is read once."""
        self._joined: tuple[list[str], dict[str, TaskRow]] = ([], {})
        """The lists that there were, and what they say together."""

    def add(self, names: Sequence[str], run_dirs: Mapping[str, str] | None = None) -> None:
        """Make a pending row for every name that has none; rows that exist keep their state. One file for all."""
        known = self._added().keys() | {path.stem for path in self.folder.glob("*.json")}
        new = [
            [check_name(name), index, (run_dirs or {}).get(name)]
            for index, name in enumerate(names)
            if name not in known
        ]
        if new:
            text = json.dumps(new) + "\n"
            write_atomic(self.folder / ADDED / f"{sha256_text(text)[:16]}.json", text)

    def rows(self) -> list[TaskRow]:
        """All rows in the order they were added. A task whose process is gone still reads `running`: see `lost`."""
        found = dict(self._added())
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[path.stem] = self._read(path)
        return sorted(found.values(), key=lambda row: (row.index, row.name))

    def get(self, name: str) -> TaskRow | None:
        """One row, or None."""
        try:
            return self._read(self._row_path(name))
        except FileNotFoundError:
            return self._added().get(name)

    def _added(self) -> dict[str, TaskRow]:
        """The pending row of every task that was ever added."""
        try:
            lists = sorted(name for name in os.listdir(self.folder / ADDED) if name.endswith(".json"))
        except FileNotFoundError:
            lists = []
        for name in lists:
            if name not in self._lists:
                self._lists[name] = self._read_list(self.folder / ADDED / name)
        if lists != self._joined[0]:
            found: dict[str, TaskRow] = {}
            for name in reversed(lists):  # the first that names a task has it
                found |= self._lists[name]
            self._joined = lists, found
        return self._joined[1]

    def _read_list(self, path: Path) -> dict[str, TaskRow]:
        try:
            lines = json.loads(path.read_text(encoding="utf-8"))
            return {name: TaskRow(name=name, index=index, run_dir=run_dir) for name, index, run_dir in lines}
        except (ValueError, TypeError):
            raise RunDirError(f"{path} is damaged; delete it, and the same command adds its tasks again") from None

    def update(self, name: str, **changes: Any) -> TaskRow:
        """Change fields of a row and make it durable. For the holder of the task's claim, and before there is one."""
        return self._write([(self.get(name) or TaskRow(name=name), changes)])[0]

    def start(self, name: str, job: str | None = None) -> TaskRow:
        """The task starts here and now: one more attempt."""
        return self.start_all([name], job)[0]

    def start_all(self, names: Iterable[str], job: str | None = None) -> list[TaskRow]:
        """All of these start here and now; their rows are made durable together."""
        here = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        fresh = {"state": "running", "reason": None, "started": time.time(), "seconds": None, **here}
        rows = [self.get(name) or TaskRow(name=name) for name in names]
        return self._write(
            [(r, {**fresh, "attempts": r.attempts + 1, "deaths": r.deaths + (r.state == "running")}) for r in rows]
        )

    def finish(self, name: str, state: State, reason: str | None = None) -> TaskRow:
        """The attempt is over: `done`, `failed` with its reason, or `pending` again."""
        return self.finish_all([name], state, reason)[0]

    def finish_all(self, names: Iterable[str], state: State, reason: str | None = None) -> list[TaskRow]:
        """The attempt at all of these is over; their rows are made durable together."""
        now, rows = time.time(), [self.get(name) or TaskRow(name=name) for name in names]
        changes = {"state": state, "reason": reason}
        return self._write([(r, {**changes, "seconds": now - r.started if r.started else None}) for r in rows])

    def started(self) -> set[str]:
        """Names of the tasks that have a row of their own: those that were ever started. One look at the folder."""
        try:
            return {name[:-5] for name in os.listdir(self.folder) if name.endswith(".json")}
        except FileNotFoundError:
            return set()

    def _write(self, changed: Sequence[tuple[TaskRow, dict[str, Any]]]) -> list[TaskRow]:
        """Rows with changes, written with one sync."""
        rows = [validate(TaskRow, {**row.model_dump(), **changes}, f"row {row.name}") for row, changes in changed]
        write_all({self._row_path(row.name): row.model_dump_json() + "\n" for row in rows})
        return rows

    def claim(self, names: Iterable[str], wait_s: float = 2.0) -> Claim | None:
        """The right to run these tasks, all or none; None when another live process has one of them.

        wait_s: seconds to try, because `lost` looks at a lock by taking it for an instant.

        `RunDirError` for more tasks than this process may have files open.
        """
        files: list[int] = []
        deadline = time.monotonic() + wait_s
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            file = self._open_lock(name, files)
            files.append(file)
            while not try_lock(file, self.folder):
                if time.monotonic() > deadline:
                    Claim(files).release()
                    return None
                time.sleep(0.02)
        return Claim(files)

    def _open_lock(self, name: str, held: list[int]) -> int:
        """A task's lock file. Where the soft limit of open files is reached it is raised to the hard one."""
        path, flags = self._lock_path(name), os.O_RDWR | os.O_CREAT
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno != errno.EMFILE:
                Claim(held).release()
                raise
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            return os.open(path, flags, 0o666)
        except OSError:
            count = len(held)
            Claim(held).release()
            raise RunDirError(
                f"{self.folder}: a process holds one open file a task, and the limit here is {hard} (at task "
                f"{count + 1}, {name}); raise it (ulimit -Hn), or let fewer tasks run in one process (pack.max_jobs, "
                "--launcher local)"
            ) from None

    def lost(self, row: TaskRow) -> bool:
        """Whether the row says `running` although no live process holds the task."""
        if row.state != "running":
            return False
        try:
            file = os.open(self._lock_path(row.name), os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            return try_lock(file, self.folder)
        finally:
            os.close(file)

    @contextlib.contextmanager
    def driver(self, what: str) -> Iterator[None]:
        """Held by the process that hands out tasks. `RunDirError` names the other one when there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self.folder / ".driver", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(file, self.folder):
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

    def _read(self, path: Path) -> TaskRow:
        try:
            return TaskRow.model_validate_json(path.read_text(encoding="utf-8"))
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
