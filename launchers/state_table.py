"""The state of each task of a fan-out (`StateTable`), and the jobs submitted to a scheduler (`Submissions`).

The names of the tasks are stored in lists, `RUN_DIR/tasks/.added/HASH.json`: one immutable file for all tasks that were
added at once. The state of a task that was started is one small file, `RUN_DIR/tasks/NAME.json`, replaced by an atomic
rename; a task without one is pending. Writers of different tasks never touch the same file, so there is no shared log
to corrupt, compact or lock, and a reader sees either the old row or the new one.

A process must hold the `flock` of a task's lock file for as long as it runs the task. The kernel (or the file server)
releases the lock when the process ends, even if it is killed. No lease has to expire first, so that a restarted driver
continues at once.
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
from typing import Literal

from fine_dist.core.config import Config, validate
from fine_dist.core.errors import RunDirError
from fine_dist.core.files import sha256_text, write_all, write_atomic
from fine_dist.core.json_files import as_record, read_json
from fine_dist.core.locks import is_locked, try_lock
from fine_dist.launchers.spec import check_name

State = Literal["pending", "running", "done", "failed"]
FINAL = ("done", "failed")
"""States of a task whose last attempt has reported its end."""
ADDED = ".added"
"""Name of the folder with the lists of tasks."""


class TaskRow(Config):
    """The state of one task."""

    name: str
    """Name of the task."""
    index: int = 0
    """Position of the task in the fan-out."""
    state: State = "pending"
    """State of the last attempt. It stays `running` if the process was killed: see `StateTable.lost`."""
    reason: str | None = None
    """Why the last attempt failed or stopped."""
    attempts: int = 0
    """Number of times the task was started."""
    deaths: int = 0
    """Number of attempts whose process was killed before it could record its end, most likely for lack of memory."""
    host: str | None = None
    """Host of the last attempt."""
    pid: int | None = None
    """Process id of the last attempt."""
    job: str | None = None
    """The scheduler's name of the job of the last attempt."""
    run_dir: str | None = None
    """Run directory of the task."""
    started: float | None = None
    """Unix time at which the last attempt started."""
    seconds: float | None = None
    """Duration of the last attempt in seconds."""


class TaskClaim:
    """The exclusive right to run some tasks, held until `release`, the end of a `with` block or of this process."""

    def __init__(self, files: list[int]) -> None:
        self._files = files  # descriptors of the locked files

    def release(self) -> None:
        """Let other processes run the tasks."""
        # Closing the only descriptor of an open file releases its `flock`.
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> TaskClaim:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class StateTable:
    """The durable state table of a fan-out in `RUN_DIR/tasks`.

    Any process on any host may read it. Only the process with a task's claim writes the task's row; without a claim,
    the driver does. All methods that read raise `RunDirError` if a file of the table is damaged.

    Args:
        run_dir: Run directory of the fan-out.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "tasks"
        # Pending rows by list file. The files are immutable, so each is read once.
        self._lists: dict[str, dict[str, TaskRow]] = {}
        # The list files that were found last, and the rows of all of them.
        self._merged: tuple[list[str], dict[str, TaskRow]] = ([], {})

    def add(self, names: Sequence[str], run_dirs: Mapping[str, str] | None = None) -> None:
        """Add a pending row for every name that has none, all in one file. Existing rows keep their state.

        Args:
            names: Names of all tasks, in the order of the fan-out.
            run_dirs: Run directory of each task, by name.

        Raises:
            ValueError: A name cannot be a file name.
        """
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
        """All rows in the order of the fan-out. The row of a killed process still says `running`: see `lost`."""
        rows = dict(self._added())
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                rows[path.stem] = self._read(path)
        return sorted(rows.values(), key=lambda row: (row.index, row.name))

    def get(self, name: str) -> TaskRow | None:
        """The row of a task, or None if there is no such task."""
        try:
            return self._read(self._row_path(name))
        except FileNotFoundError:
            return self._added().get(name)

    def _added(self) -> dict[str, TaskRow]:
        """The pending row of every task that was added."""
        try:
            lists = sorted(name for name in os.listdir(self.folder / ADDED) if name.endswith(".json"))
        except FileNotFoundError:
            lists = []
        for name in lists:
            if name not in self._lists:
                self._lists[name] = self._read_list(self.folder / ADDED / name)
        if lists != self._merged[0]:
            rows: dict[str, TaskRow] = {}
            for name in reversed(lists):  # a task in several lists keeps the row of the first
                rows |= self._lists[name]
            self._merged = lists, rows
        return self._merged[1]

    def _read_list(self, path: Path) -> dict[str, TaskRow]:
        remedy = "delete it, and the same command adds its tasks again"
        kind = list[tuple[str, int, str | None]]
        lines = as_record(kind, read_json(path, RunDirError, remedy), path, RunDirError, remedy)
        return {name: TaskRow(name=name, index=index, run_dir=run_dir) for name, index, run_dir in lines}

    def update(self, name: str, **changes: object) -> TaskRow:
        """Change fields of a row and sync it to disk."""
        return self._write([(self.get(name) or TaskRow(name=name), changes)])[0]

    def reopen(self, names: Iterable[str]) -> list[str]:
        """Set rows from `done` back to `pending`, because their results are not complete for a new config.

        Returns:
            The names that were reopened.
        """
        rows = [row for name in names if (row := self.get(name)) is not None and row.state == "done"]
        self._write([(row, {"state": "pending", "reason": "more steps were asked for"}) for row in rows])
        return [row.name for row in rows]

    def start(self, name: str, job: str | None = None) -> TaskRow:
        """Record that this process starts one more attempt at the task."""
        return self.start_all([name], job)[0]

    def start_all(self, names: Iterable[str], job: str | None = None) -> list[TaskRow]:
        """Record that this process starts one more attempt at each of these tasks, with one sync for all rows."""
        # If a row still says `running`, the previous attempt was killed, because this process holds the claim now.
        where = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        changes = {"state": "running", "reason": None, "started": time.time(), "seconds": None, **where}
        rows = [self.get(name) or TaskRow(name=name) for name in names]
        return self._write(
            [(r, {**changes, "attempts": r.attempts + 1, "deaths": r.deaths + (r.state == "running")}) for r in rows]
        )

    def finish(self, name: str, state: State, reason: str | None = None) -> TaskRow:
        """Record how the attempt ended: `done`, `failed` with its reason, or `pending` again."""
        return self.finish_all([name], state, reason)[0]

    def finish_all(self, names: Iterable[str], state: State, reason: str | None = None) -> list[TaskRow]:
        """Record how the attempt at each of these tasks ended, with one sync for all rows."""
        now, rows = time.time(), [self.get(name) or TaskRow(name=name) for name in names]
        changes = {"state": state, "reason": reason}
        return self._write([(r, {**changes, "seconds": now - r.started if r.started else None}) for r in rows])

    def started(self) -> set[str]:
        """Names of the tasks that were ever started, from one listing of the folder."""
        try:
            return {name[:-5] for name in os.listdir(self.folder) if name.endswith(".json")}
        except FileNotFoundError:
            return set()

    def _write(self, changed: Sequence[tuple[TaskRow, dict[str, object]]]) -> list[TaskRow]:
        """Write rows with their changes, with one sync."""
        rows = [validate(TaskRow, {**row.model_dump(), **changes}, f"row {row.name}") for row, changes in changed]
        # One sync for all files, because syncs take most of the time.
        write_all({self._row_path(row.name): row.model_dump_json() + "\n" for row in rows})
        return rows

    def claim(self, names: Iterable[str], wait_s: float = 2.0) -> TaskClaim | None:
        """Claim these tasks for this process, all or none.

        Args:
            names: The tasks.
            wait_s: Seconds to wait for each lock, because `lost` tests a lock by taking it for a moment.

        Returns:
            The claim, or None if another live process holds one of the tasks.

        Raises:
            RunDirError: There are more tasks than this process may have open files, or the file system has no locks.
        """
        files: list[int] = []
        deadline = time.monotonic() + wait_s
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            # Lock files are never removed. A process that had opened one before would lock the removed file, while
            # another one creates and locks a new file of the same name.
            file = self._open_lock(name, files)
            files.append(file)
            while not try_lock(file, self.folder):
                if time.monotonic() > deadline:
                    # Two packs that share tasks must not each hold a part of them.
                    TaskClaim(files).release()
                    return None
                time.sleep(0.02)
        return TaskClaim(files)

    def _open_lock(self, name: str, held: list[int]) -> int:
        """Open a task's lock file. At the soft limit of open files, raise it to the hard limit."""
        path, flags = self._lock_path(name), os.O_RDWR | os.O_CREAT
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno != errno.EMFILE:
                TaskClaim(held).release()
                raise
        # The soft limit is often 1024, for programs that use `select`; the hard limit is what the site allows.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            return os.open(path, flags, 0o666)
        except OSError:
            count = len(held)
            TaskClaim(held).release()
            raise RunDirError(
                f"{self.folder}: a process holds one open file a task, and the limit here is {hard} (at task "
                f"{count + 1}, {name}); raise it (ulimit -Hn), or let fewer tasks run in one process (pack.max_jobs, "
                "--launcher local)"
            ) from None

    def lost(self, row: TaskRow) -> bool:
        """Whether a row says `running` although no live process holds the task. Read permission is enough."""
        return row.state == "running" and is_locked(self._lock_path(row.name)) is False

    @contextlib.contextmanager
    def driver(self, what: str) -> Iterator[None]:
        """A context that only one process may be in: the one that starts the tasks of the fan-out.

        If the block raises an error before any task was added, the files and folders that it created are removed.

        Args:
            what: Description of this process, for the error message of another one.

        Raises:
            RunDirError: Another live process is in this context; the message names it.
        """
        # Listed before they are created, so that no folder of another program is removed after an error.
        created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / ".driver"
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(file, self.folder):
                owner = os.read(file, 4096).decode(errors="replace").strip()
                raise RunDirError(
                    f"{self.folder.parent}: another fan-out is handing out its tasks ({owner}); "
                    "wait for it, stop it, or use another run_dir"
                )
            # Written only after locking, because until then the text names the process that holds the lock.
            os.ftruncate(file, 0)
            os.write(file, f"{what}, process {os.getpid()} on {socket.gethostname()}".encode())
            try:
                yield
            except BaseException:
                if self.folder in created and not self._added():
                    lock.unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # a folder that another program has used meanwhile is not empty
                        for path in created:
                            path.rmdir()
                raise
        finally:
            os.close(file)

    def _row_path(self, name: str) -> Path:
        return self.folder / f"{check_name(name)}.json"

    def _lock_path(self, name: str) -> Path:
        return self.folder / f".{check_name(name)}.lock"

    def _read(self, path: Path) -> TaskRow:
        remedy = "delete it to have the task run again"
        row: TaskRow = as_record(TaskRow, read_json(path, RunDirError, remedy), path, RunDirError, remedy)
        return row


class Submissions:
    """The jobs that were submitted to a scheduler from a run directory: `RUN_DIR/jobs/.submitted`.

    Each submission is one file. Job ids are not part of the rows, because a scheduler may start a task, which then
    writes its row, before the submitting process knows the id.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "jobs" / ".submitted"

    def add(self, jobs: Mapping[str, Sequence[str]]) -> None:
        """Record the names of the tasks of each job, by the scheduler's job id."""
        if jobs:
            file = re.sub("[^A-Za-z0-9_.-]", "_", next(iter(jobs))) + ".json"
            write_atomic(self.folder / file, json.dumps({job: [*names] for job, names in jobs.items()}) + "\n")

    def all(self) -> dict[str, list[str]]:
        """Names of the tasks of every submitted job, by the scheduler's job id.

        Raises:
            RunDirError: A file of the folder is damaged.
        """
        jobs: dict[str, list[str]] = {}
        for path in sorted(self.folder.glob("*.json")):
            remedy = "delete it if none of its jobs is queued or running"
            jobs |= as_record(dict[str, list[str]], read_json(path, RunDirError, remedy), path, RunDirError, remedy)
        return jobs
