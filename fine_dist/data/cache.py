"""A folder of limited size with copies of remote files, shared by any number of processes on a machine.

A file gets its name only when it is complete. The process that fetches it holds a lock on its `.part`; others that need
the same file wait for that lock. Space is reserved before a fetch begins, so that the folder never exceeds its limit.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_PART = ".part"


class Cache:
    """A folder of at most `cap_bytes` of files, from which the least recently used files are removed first."""

    def __init__(self, folder: str | Path, cap_bytes: int) -> None:
        self.folder, self.cap_bytes = Path(folder), cap_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> int | None:
        """Open a file of the cache and fetch it first if it is missing.

        Args:
            name: Name of the file in the cache.
            size: Its size in bytes; a file of another size is fetched again.
            fetch: Writes the content into an open file.

        Returns:
            A file descriptor, which the caller closes; None when the cache has no room for the file.
        """
        fd = self._hit(name, size)
        if fd is not None:
            return fd
        with self._own_part(name) as part:
            # Checked again: this process may have waited for minutes while another one fetched the file.
            fd = self._hit(name, size)
            if fd is not None:
                return fd
            if not self._reserve(part, size):
                return None
            fetch(part)
            part.flush()
            if os.fstat(part.fileno()).st_size != size:
                return None
            with self._exclusive():
                os.replace(self.folder / (name + _PART), self.folder / name)
            part.seek(0)
            # The descriptor and not the name: another process may have removed the file from the cache already.
            return os.dup(part.fileno())

    def _hit(self, name: str, size: int) -> int | None:
        try:
            fd = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(fd).st_size != size:
            os.close(fd)
            return None
        # The modification time records the last use: the oldest files are evicted first.
        os.utime(fd)
        return fd

    @contextmanager
    def _own_part(self, name: str) -> Iterator[BinaryIO]:
        """A context with the locked, unfinished file. It is removed unless the block has renamed it."""
        path = self.folder / (name + _PART)
        while True:
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as part:
                # Blocks while another process fetches this file, instead of fetching it a second time.
                fcntl.flock(part, fcntl.LOCK_EX)
                if not _is_still(path, part):
                    continue  # the previous owner renamed or removed the file, so that this lock protects nothing
                try:
                    yield part
                finally:
                    with self._exclusive():
                        if _is_still(path, part):
                            path.unlink()
                return

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """A context in which no other process adds, renames or removes a file."""
        with open(self.folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, part: BinaryIO, size: int) -> bool:
        """Remove old files until `size` bytes fit, and reserve the bytes by extending the part; whether they fit."""
        with self._exclusive():
            # The part may have the length that a killed process reserved, which must not count twice.
            os.ftruncate(part.fileno(), 0)
            files, total = [], 0
            for entry in os.scandir(self.folder):
                if entry.name.endswith(_PART) and _is_dead(entry.path, part):
                    os.unlink(entry.path)
                    continue
                stat = entry.stat()
                total += stat.st_size
                if not entry.name.endswith(_PART) and entry.name != ".lock":
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
            for _, held, path in sorted(files):
                if total + size <= self.cap_bytes:
                    break
                os.unlink(path)
                total -= held
            if total + size > self.cap_bytes:
                return False
            # The sparse file already has its final length, so other processes count its bytes before they arrive.
            os.ftruncate(part.fileno(), size)
            return True


def _is_still(path: Path, part: BinaryIO) -> bool:
    """Whether this open file is the file at the path."""
    try:
        return os.stat(path).st_ino == os.fstat(part.fileno()).st_ino
    except FileNotFoundError:
        return False


def _is_dead(path: str, own_part: BinaryIO) -> bool:
    """Whether a part belongs to no running process, that is whether nobody holds its lock."""
    try:
        with open(path, "rb") as part:
            # A second descriptor of this process's own part would conflict with its own lock.
            if os.fstat(part.fileno()).st_ino == os.fstat(own_part.fileno()).st_ino:
                return False
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False
