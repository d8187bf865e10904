"""Exclusive locks on files, which the kernel releases when the process that holds them ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fine_dist.core.errors import RunDirError


def try_lock(file: int, where: str | Path, *, posix: bool = False) -> bool:
    """Take an exclusive lock on an open file without waiting; returns whether that worked.

    Args:
        file: Descriptor of the file.
        where: Path for the error message.
        posix: Take a POSIX lock (`lockf`), which belongs to the process, is not inherited by children and works over
            NFS before version 4. Otherwise the lock (`flock`) belongs to the open file.

    Raises:
        RunDirError: The file system has no working locks.
    """
    lock = fcntl.lockf if posix else fcntl.flock
    try:
        # Without waiting: a held lock means that another process runs this, which the user should be told at once.
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        # Which of the two is returned for a held lock depends on the system and on the kind of lock.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise RunDirError(
            f"{where}: this file system has no working locks ({error.strerror}); mount it with locks "
            "(Lustre: -o flock, NFS: version 4) or use a run_dir on another one"
        ) from None


def is_locked(path: str | Path, *, posix: bool = False) -> bool | None:
    """Whether a live process holds an exclusive lock on a file. Read permission is enough.

    Args:
        path: The lock file.
        posix: The kind of lock, as in `try_lock`. This process's own lock of that kind is not seen, and is lost.

    Returns:
        None when that is unknown: the file is not readable, or its file system has no locks.
    """
    lock = fcntl.lockf if posix else fcntl.flock
    try:
        with open(path, "rb") as file:
            lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a shared lock: readers on a read-only mount may take it
            return False
    except FileNotFoundError:
        return False
    except OSError as error:
        # EACCES means either "held" or "no read permission"; for a readable file it means "held".
        return True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and os.access(path, os.R_OK) else None


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """A context that holds an exclusive lock on an existing file; it waits until another holder has released it."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
