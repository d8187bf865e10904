"""Exclusive locks on files, which end with their holder however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fine_dist.core.errors import RunDirError


def try_lock(file: int, where: str | Path, *, posix: bool = False) -> bool:
    """Take an exclusive lock on an open file if nobody has it; gone with its holder, however that ends.

    posix: a lock of the process (seen over NFS before version 4, not inherited by children) instead of the open file's.
    where: what to name when the file system has no working locks (`RunDirError`).
    """
    take = fcntl.lockf if posix else fcntl.flock
    try:
        take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise RunDirError(
            f"{where}: this file system has no working locks ({error.strerror}); mount it with locks "
            "(Lustre: -o flock, NFS: version 4) or use a run_dir on another one"
        ) from None


def is_locked(path: str | Path, *, posix: bool = False) -> bool | None:
    """Whether a live process holds an exclusive lock on a file. Needs only the right to read it.

    Args:
        path: The lock file.
        posix: The kind of lock, as in `try_lock`. This process's own lock of that kind is not seen, and is lost.

    Returns:
        None when it cannot be told: the file may not be read, or its file system has no locks.
    """
    take = fcntl.lockf if posix else fcntl.flock
    try:
        with open(path, "rb") as file:
            take(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a shared lock: readers on a read-only mount may take it
            return False
    except FileNotFoundError:
        return False
    except OSError as error:
        return True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and os.access(path, os.R_OK) else None


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on a file that is there, waiting for whoever has it."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
