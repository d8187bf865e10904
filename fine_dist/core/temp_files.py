"""Temporary files beside their destination: their names, their locks, and removal of those that killed writers left.

A writer fills a temporary file and renames it, so that readers never see a part of a file. Files that end in `.part`
carry their writer's lock. Files and folders that end in `.tmp` do not, and are judged by their age.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import socket
import time
from pathlib import Path

from fine_dist.core.retry import remove_tree


def temp_path(path: Path) -> Path:
    """A hidden name beside `path` that no other writer, on whatever host, uses."""
    # Host, process and time: several nodes may write temporary files for one destination at the same instant.
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}.tmp")


def open_temp_file(path: Path) -> io.FileIO:
    """A new locked file beside `path`, to be written and renamed. The lock tells other processes that we are alive."""
    temp = temp_path(path).with_suffix(".part")
    while True:
        file = io.FileIO(temp, "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # `remove_stale_temp_files` holds the lock for a moment, and then removes the file
            file.close()
            continue
        except OSError:  # this file system has no locks; then no process removes the file either
            return file
        with contextlib.suppress(FileNotFoundError):
            # Between opening and locking, `remove_stale_temp_files` may have
            # removed the name. Such a file could not be renamed any more.
            if os.stat(temp).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


def remove_stale_temp_files(folder: str | Path, older_than_s: float = 3600.0) -> int:
    """Remove the temporary files and folders that killed writers left in a folder, on any host; returns their number.

    Args:
        folder: The folder.
        older_than_s: Age in seconds below which entries without a lock (`.tmp`: folders, and files that a library
            writes by name) are left, because their writer may be alive.
    """
    count = 0
    for path in Path(folder).glob(".*.part"):
        # The error that is suppressed: locked by a live writer, removed meanwhile, or a file system without locks.
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            count += 1
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > older_than_s:
                remove_tree(path) if path.is_dir() else path.unlink()
                count += 1
    return count
