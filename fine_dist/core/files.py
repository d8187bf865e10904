"""Files that are whole or not there, hashes, locks, and the rows of a metrics.jsonl, for every room."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fine_dist.core.errors import NotAFile

T = TypeVar("T")
log = logging.getLogger(__name__)

_PIECE = 1 << 20
_DRAFTS = 256
"""Files that `write_all` has open at once."""


# --- whole or not at all ---------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, content: str | bytes, *, durable: bool = True) -> Path:
    """Replace a file as a whole: a reader, or a power cut, sees the old content or the new. Makes its folder.

    durable: false leaves the syncing to the caller, for many files at once (`sync_disk`).
    """
    path = Path(path)

    def write() -> None:
        with _draft(path, content, durable=durable) as draft:
            os.replace(draft, path)

    retried(write)
    return path


def write_all(contents: Mapping[Path, str]) -> None:
    """Replace many files, each as a whole: all drafts are made durable with one sync, then each takes its name.

    A sync of a slow file system takes as long for one file as for a hundred. Their folder is one, and is made.
    """
    if len(contents) < 2:
        for path, content in contents.items():
            write_atomic(path, content)
        return
    waiting = list(contents.items())
    while waiting:  # each draft is an open file until it has its name
        some, waiting = waiting[:_DRAFTS], waiting[_DRAFTS:]
        with contextlib.ExitStack() as stack:
            drafts = {path: stack.enter_context(_draft(path, content, durable=False)) for path, content in some}
            sync_disk(some[0][0].parent)
            for path, draft in drafts.items():
                os.replace(draft, path)


def write_new(path: str | Path, content: str | bytes, *, durable: bool = True) -> Path:
    """As `write_atomic`, but `FileExistsError` when the file is there already.

    durable: false leaves the syncing to the caller, for many files at once (`sync_disk`).
    """
    path = Path(path)
    with _draft(path, content, durable=durable) as draft:
        name_new(draft, path)
    return path


def name_new(draft: str | Path, path: str | Path) -> None:
    """Give a finished draft its name; `FileExistsError` when the name is taken, with the other file left whole.

    A hard link does both at once. FUSE mounts of buckets, FAT and some SMB shares have none: there the name is taken
    with an empty file first, which no other writer can take, and the draft replaces that.
    """
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(draft, path)


NO_LINKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)
"""Errors by which a file system says that it makes no hard links."""
TRANSIENT = (errno.ESTALE, errno.EIO, errno.EBUSY, errno.ETIMEDOUT)
"""Errors of network file systems that often pass: a server that fails over, a handle that another client replaced."""
WAITS_S = (0.1, 0.5, 2.0)
"""Seconds before each further attempt."""


def retried(action: Callable[[], T], errors: tuple[int, ...] = TRANSIENT) -> T:
    """Do something with files, and once more after each of a few waits when it fails by an error that may pass."""
    for wait_s in WAITS_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in errors:
                raise
            log.debug("%s; another attempt in %g s", error, wait_s)
            time.sleep(wait_s)
    return action()


def remove_tree(folder: str | Path) -> bool:
    """Remove a folder that nobody needs any more; whether it is gone.

    On NFS a folder stays while another process has a file of it open (ENOTEMPTY, EBUSY). Such a folder is left for the
    next time, with a warning, because it is no reason to end a run.
    """

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)

    try:
        retried(remove, (*TRANSIENT, errno.ENOTEMPTY))
    except OSError as error:
        log.warning("%s could not be removed (%s); it is left for the next time", folder, error.strerror)
        return False
    return True


@contextlib.contextmanager
def _draft(path: Path, content: str | bytes, *, durable: bool) -> Iterator[Path]:
    """A written draft, locked until the block has given it its name; gone afterwards under its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BufferedWriter(open_draft(path)) as file:
        draft = Path(file.raw.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            yield draft
        finally:
            draft.unlink(missing_ok=True)


def open_draft(path: Path) -> io.FileIO:
    """A new file beside `path` to write and rename. Its writer's lock is on it, by which others know that it lives."""
    draft = draft_name(path).with_suffix(".part")
    while True:
        file = io.FileIO(draft, "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody is just looking whether it is a dead writer's, and will remove it
            file.close()
            continue
        except OSError:  # no locks here; then nobody removes it either
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.stat(draft).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


@contextlib.contextmanager
def whole_file(path: str | Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary path for a library that writes by name; synced, it takes the place of `path` when the block ends
    well, and nothing of it is left when the block raises. Makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_name(path).with_suffix(suffix)
    try:
        yield draft
        give_usual_mode(draft)
        sync_file(draft)
        os.replace(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[None]:
    """Around a library's own writing of a file: what ends it half-way (a full disk, a quota, a limit) is an `OSError`.

    safetensors has the system's number in its message; torch.save hides it, so that the file is asked once more.
    """
    try:
        yield
        give_usual_mode(path)
    except OSError:
        raise
    except Exception as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        if Path(path).is_file():
            with open(path, "ab") as file:
                file.write(bytes(_PIECE))
                file.flush()
                os.fsync(file.fileno())
        raise


def give_usual_mode(path: str | Path) -> None:
    """Give a new file the mode that `open` would: what the umask leaves of rw-rw-rw-.

    safetensors writes by way of a private temporary file, whose 0600 stays, and colleagues cannot read the model.
    """
    os.chmod(path, 0o666 & ~umask())


def umask() -> int:
    """The umask of this process. Read from /proc, since to ask the system for it is to set it, for all threads."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def draft_name(path: Path) -> Path:
    """A hidden name beside `path` that no other writer, on whatever host, uses."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}.tmp")


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder under a temporary name, which takes the place of `folder` when the block ends well.

    Files in it are synced before it gets its name; when the block raises, nothing of it is left.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_name(folder)
    draft.mkdir()
    try:
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                give_usual_mode(path)
                sync_file(path)
        if folder.exists():
            stale = draft_name(folder)
            os.rename(folder, stale)
            os.rename(draft, folder)
            remove_tree(stale)
        else:
            os.rename(draft, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: str | Path, older_than_s: float = 3600.0) -> int:
    """Remove what killed writers left in a folder, on whatever host; how many there were.

    older_than_s: drafts that carry no lock of their writer (folders, and files that a library writes by name) may have
                  a living one when they are younger.
    """
    count = 0
    for path in Path(folder).glob(".*.part"):
        with contextlib.suppress(OSError), open(path, "rb") as file:  # locked, or gone meanwhile, or no locks here
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            count += 1
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > older_than_s:
                remove_tree(path) if path.is_dir() else path.unlink()
                count += 1
    return count


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_disk(folder: str | Path) -> None:
    """Make everything durable that was written to the file system of a folder: one call for thousands of files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


# --- reading ----------------------------------------------------------------------------------------------------------


def check_regular(path: str | Path) -> None:
    """`NotAFile` when a named pipe, a socket or a device is there: to be asked before a library opens it by its name.

    Opening a pipe that nobody writes to waits for ever, a terminal waits for a hand, and /dev/zero never ends. What is
    not there, or is a folder, is left to the one who opens it.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _refuse_irregular(os.stat(path).st_mode, path)


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, open for reading. `NotAFile` for anything else that is no folder."""
    return os.fdopen(descriptor_of(path), "rb")


def descriptor_of(path: str | Path) -> int:
    """The descriptor of a regular file, open for reading; errors as `open_regular`. The caller closes it."""
    check_regular(path)
    # not to wait, should it have become a pipe meanwhile; a regular file does not know this flag
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _refuse_irregular(mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_bytes(path: str | Path, most: int = -1) -> bytes:
    """The content of a regular file, or its first `most` bytes. `NotAFile` as `open_regular`."""
    with open_regular(path) as file:
        return file.read(most)


def read_text(path: str | Path, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file. `NotAFile` as `open_regular`; `UnicodeDecodeError` for other bytes."""
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


# --- hashes ----------------------------------------------------------------------------------------------------------


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


# --- rows of a metrics.jsonl -----------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """All whole rows; a line that is being written, or that a crash cut short, is left out. Empty without a file."""
    try:
        lines = read_text(path, "replace").splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := as_row(line)) is not None]


def last_row(path: str | Path, key: str = "", within: int = 1 << 14) -> dict[str, Any] | None:
    """The newest whole row (that has `key`) within the last bytes of the file; none where there is none."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - within))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    rows = (as_row(line) for line in reversed(lines))
    return next((row for row in rows if row is not None and (not key or key in row)), None)


def as_row(line: str | bytes) -> dict[str, Any] | None:
    """A line of a metrics.jsonl as a row; none when it is no JSON object with a step, a whole number of 0 or more."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
