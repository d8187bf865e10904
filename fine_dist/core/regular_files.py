"""Reading of regular files, never of pipes or devices, and of the rows of a metrics.jsonl."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from fine_dist.core.errors import NotAFile


def check_regular(path: str | Path) -> None:
    """Refuse a named pipe, a socket or a device, before a library opens the path by its name.

    Opening a pipe that nobody writes to blocks, a terminal waits for input, and /dev/zero never ends. A missing file or
    a folder passes: opening it raises the usual error.

    Raises:
        NotAFile: The path is a pipe, a socket or a device.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        # Before opening: opening alone makes some devices do something, such as rewinding a tape.
        _refuse_irregular(os.stat(path).st_mode, path)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, in binary mode.

    Raises:
        NotAFile: The path is a pipe, a socket or a device.
        OSError: As `open` raises it, for a folder too.
    """
    return os.fdopen(descriptor_of(path), "rb")


def descriptor_of(path: str | Path) -> int:
    """The descriptor of a regular file, open for reading. The caller closes it. Errors as in `open_regular`."""
    check_regular(path)
    # O_NONBLOCK: the path may have become a pipe since the check, and opening a pipe
    # would wait for a writer. The flag has no effect on a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        # The descriptor is tested, not the path: another process can exchange what the path names.
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _refuse_irregular(mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_bytes(path: str | Path, most: int = -1) -> bytes:
    """The content of a regular file, or its first `most` bytes. Errors as in `open_regular`."""
    with open_regular(path) as file:
        return file.read(most)


def read_text(path: str | Path, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file. Errors as in `open_regular`, and UnicodeDecodeError for other bytes."""
    return read_bytes(path).decode("utf-8", errors)


def _refuse_irregular(mode: int, path: str | Path) -> None:
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if kind := kinds.get(stat.S_IFMT(mode)):
        raise NotAFile(errno.EINVAL, f"is {kind}, no regular file", str(path))


# --- rows of a metrics.jsonl -----------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All complete rows of a file. A line that is being written, or that a crash cut short, is left out.

    Returns:
        The rows, oldest first; an empty list when there is no file.
    """
    try:
        lines = read_text(path, "replace").splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := as_row(line)) is not None]


def last_row(path: str | Path, key: str = "", within: int = 1 << 14) -> dict[str, Any] | None:
    """The newest complete row at the end of a file.

    Args:
        path: The file.
        key: Key that the row must have; empty: any row.
        within: Bytes at the end of the file that are searched.

    Returns:
        The row, or None when there is no file or no such row.
    """
    try:
        with open_regular(path) as file:
            # The end alone is read: a status command asks for the newest row of files that grow for weeks.
            file.seek(max(0, file.seek(0, os.SEEK_END) - within))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    rows = (as_row(line) for line in reversed(lines))
    return next((row for row in rows if row is not None and (not key or key in row)), None)


def as_row(line: str | bytes) -> dict[str, Any] | None:
    """A line of a metrics.jsonl as a row, or None when it is no JSON object with a non-negative integer `step`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
