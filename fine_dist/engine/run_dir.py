"""A run directory: config, environment, checkpoints, logs and result of a run. One process owns it at a time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from fine_dist.core.config import Config, dump_yaml
from fine_dist.core.errors import ReportedElsewhere, RunDirError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import Record, read_record
from fine_dist.core.locks import is_locked, try_lock
from fine_dist.core.regular_files import read_bytes
from fine_dist.core.temp_files import remove_stale_temp_files
from fine_dist.engine.world import World, read_environment

CONFIG, IDENTITY, DONE, METRICS = "config.yaml", "identity.json", "DONE.json", "metrics.jsonl"
STOP, STOPPED = "STOP", "STOPPED"
"""The file by which a user stops a run permanently, and its name after the run has read it."""

_held: dict[str, Any] = {}
"""Lock files that this process holds, by path. A POSIX lock does not exclude the process that holds it."""


class RunIdentity(Record):
    """identity.json: the settings and inputs that must match for a run to be resumed."""

    kind: str
    """The kind of run: `condense`, `train`, ..."""
    identity: dict[str, Any]
    """Settings and hashes by name."""


class EnvironmentFile(Record):
    """environment.json: the machines on which a run was started."""

    starts: list[dict[str, Any]] = Field(default_factory=list)
    """One entry for each of the last hundred starts."""


class DoneFile(Record):
    """DONE.json: the result of a finished run."""

    steps: int | None = Field(None, ge=0)
    """Number of updates, if the run trains."""


class RunDir:
    """Paths and ownership of a run directory.

    `open` locks it for this process, `claim` writes config and identity once the first step has worked, and `close` (or
    leaving a `with` block) unlocks it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / METRICS
        self._lock: str | None = None
        self._kind, self._new = "", False
        self._identity: dict[str, Any] = {}

    def open(self, kind: str, identity: Mapping[str, Any], world: World | None = None) -> RunDir:
        """Lock the directory for this process. Nothing is written yet, and no file of another run is changed.

        Args:
            kind: Kind of the run (`condense`, `train`, ...); a directory holds one kind.
            identity: Values that must match for a run to be resumed (JSON), without paths.
            world: If given, rank 0 opens the directory and all ranks receive the outcome.

        Raises:
            RunDirError: Another live process owns it, or it belongs to another run; the message says what differs.
        """
        self._kind, self._identity = kind, json.loads(json.dumps(identity))
        rank = world.rank if world else read_environment().rank
        failure: RunDirError | OSError | None = None
        if rank == 0:
            try:
                self._open()
            except (RunDirError, OSError) as error:
                failure = error
        # Rank 0's failure is broadcast before it is raised, or the others would wait in their next collective.
        if world is not None and world.world_size > 1:
            from fine_dist.engine.dist import broadcast_object  # needs torch; `status` reads run directories without it

            if broadcast_object(failure is not None, world) and rank:
                raise ReportedElsewhere(f"rank 0 could not open the run directory {self.path}")
        if failure:
            raise failure
        return self

    def _open(self) -> None:
        # Recorded before the folder is created, so that `close` can remove the folder if the start fails.
        self._new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise RunDirError(f"run directory {self.path}: {error.strerror}; choose a place you may write to") from None
        try:
            self._check_identity()
            for folder in (self.path, self.checkpoints):
                # no other process writes them, because this one holds the lock
                remove_stale_temp_files(folder, older_than_s=0)
            (self.path / STOPPED).unlink(missing_ok=True)  # the run has been started again
        except BaseException:
            self.close()
            raise

    def check(self, kind: str, identity: Mapping[str, Any]) -> None:
        """Raise what `open` would raise about an existing run, without locking the directory or writing to it."""
        self._kind, self._identity = kind, json.loads(json.dumps(identity))
        self._check_identity()

    def claim(self, config: Config) -> None:
        """Write config, identity and environment, after the first step has worked."""
        if self._lock is None:
            return
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise RunDirError(f"{self.checkpoints} is a file, and a folder is needed there; move it away")
        self.checkpoints.mkdir(exist_ok=True)
        # Not before the first step has worked, so that a mistyped
        # setting does not overwrite the config of an existing run.
        write_atomic(self.path / CONFIG, f"# kind: {self._kind}\n{dump_yaml(config)}")
        record = {"kind": self._kind, "identity": self._identity}
        write_atomic(self.path / IDENTITY, json.dumps(record, indent=1) + "\n")
        self._write_environment(self._kind)
        (self.path / DONE).unlink(missing_ok=True)  # a finished run continues with more steps
        self._new = False

    # --- ownership --------------------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        """Take a POSIX lock, which ends with the process, is not inherited by child processes, and works on NFS."""
        path = str((self.path / "lock").resolve())
        if path in _held:
            raise RunDirError(f"run directory {self.path} is in use by this very process (pid {os.getpid()})")
        # `a+` and not `w`, because the file names its owner and must not be truncated before it is locked.
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the run has the directory
        if not try_lock(handle.fileno(), path, posix=True):
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            handle.close()
            raise RunDirError(
                f"run directory {self.path} is in use by another live process ({owner}); wait for it, stop it, or "
                "choose another directory"
            )
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
        # Flushed but not closed: closing any handle of the file would release the POSIX lock.
        handle.flush()
        _held[path], self._lock = handle, path

    def close(self) -> None:
        """Unlock the directory."""
        if self._lock is None:
            return
        if self._new:  # a start that failed before its first step leaves no files
            with contextlib.suppress(OSError):  # another process has written there in the meantime
                Path(self._lock).unlink()
                self.checkpoints.rmdir()
            with contextlib.suppress(OSError):
                self.path.rmdir()
        # The lock file is not removed: a process that has it open could then lock a file that others do not see.
        _held.pop(self._lock).close()
        self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading and writing --------------------------------------------------------------------------------------

    def _check_identity(self) -> None:
        try:
            before = read_record(RunIdentity, self.path / IDENTITY, RunDirError, "choose another directory")
            kind, old = before.kind, flat(before.identity)
        except FileNotFoundError:
            return
        if kind != self._kind:
            raise RunDirError(
                f"run directory {self.path} holds a {kind!r} run, not {self._kind!r}; choose another directory"
            )
        new = flat(self._identity)
        differing = [
            f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differing:
            raise RunDirError(
                f"run directory {self.path} belongs to another run:\n  "
                + "\n  ".join(differing)
                + "\nchoose another directory, or give the same settings to continue that run"
            )

    def _write_environment(self, kind: str) -> None:
        path = self.path / "environment.json"
        starts: list[dict[str, Any]] = []
        with contextlib.suppress(FileNotFoundError):
            remedy = "remove it: it is a note about machines and versions, and is written anew"
            starts = read_record(EnvironmentFile, path, RunDirError, remedy).starts
        world = read_environment()
        starts.append(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "world_size": world.world_size,
                "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("RAY_JOB_ID"),
            }
        )
        facts = {"kind": kind, **describe_environment(), "starts": starts[-100:]}
        write_atomic(path, json.dumps(facts, indent=1))

    @property
    def kind(self) -> str | None:
        """Kind of the run (`condense`, `train`, ...), or None before the first step."""
        try:
            first = read_bytes(self.path / CONFIG, 200).partition(b"\n")[0]
        except FileNotFoundError:
            return None
        kind = re.fullmatch(rb"# kind: ([a-z_]+)", first.strip())
        if not kind:
            raise RunDirError(f"{self.path / CONFIG} is no config of a run (its first line says no kind); copy it back")
        return kind[1].decode()

    @property
    def done(self) -> dict[str, Any] | None:
        """The content of DONE.json, or None while the run is not finished."""
        remedy = "delete it: the run then goes on from its last checkpoint"
        try:
            return read_record(DoneFile, self.path / DONE, RunDirError, remedy).model_dump(exclude_unset=True)
        except FileNotFoundError:
            return None

    def finish(self, **facts: Any) -> None:
        """Write DONE.json (JSON values), which marks the run as finished."""
        write_atomic(self.path / DONE, json.dumps(facts, indent=1))

    def take_request(self, name: str) -> bool:
        """Whether a user has put a file `STOP` or `SAVE` into the directory; the file is consumed.

        SAVE is removed. STOP is renamed to STOPPED until the run is started again, so that no launcher restarts it.
        """
        try:
            if name == STOP:
                # A rename is atomic, so that exactly one of several processes takes the request.
                (self.path / name).replace(self.path / STOPPED)
            else:
                (self.path / name).unlink()
        except FileNotFoundError:
            return False
        return True


def resumption_note(path: str | Path) -> str:
    """A sentence for the user about a run that is interrupted now: whether and how it resumes."""
    if owner_of(path):
        return "the job goes on without this command"
    if (Path(path) / DONE).exists():
        return "the run is finished"
    if (Path(path) / "checkpoints" / "LATEST").exists():
        return "the same command continues from the last checkpoint"
    return "nothing was saved yet; the same command starts again"


def was_stopped(*folders: str | Path) -> bool:
    """Whether a file STOP has stopped a run in one of these folders that has not been started again."""
    return any((Path(folder) / name).exists() for folder in folders for name in (STOP, STOPPED))


def owner_of(path: str | Path) -> str | None:
    """The process that owns a run directory, such as `pid 12 on n1`; None if no running process does."""
    lock = Path(path) / "lock"
    if str(lock.resolve()) in _held:  # opening and closing the file would release this process's own lock
        return f"pid {os.getpid()} on {socket.gethostname()}"
    if not is_locked(lock, posix=True):
        return None
    return lock.read_text(encoding="utf-8", errors="replace").strip() or "unknown"


def describe_environment() -> dict[str, Any]:
    """The machine, the versions of libraries and the git commit, for run directories and benchmarks."""
    versions = {}
    for name in ("fine_dist", "torch", "numpy", "deepspeed", "ray", "safetensors", "webdataset", "diffusers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the source tree (with `+` when it has changes), or none outside of one."""
    # Only a checkout has `.git` there. Without this test an installed
    # package would report the commit of a surrounding repository.
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    # Without optional locks, because `git status` rewrites the index and may leave a lock file behind.
    git = ["git", "--no-optional-locks", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one mapping with dotted keys."""
    flattened: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flattened.update(flat(value, f"{prefix}{key}."))
        else:
            flattened[prefix + str(key)] = value
    return flattened
