"""Atomic and durable writes, and hashes of files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from fine_dist.core.regular_files import open_regular

T = TypeVar("T")
log = logging.getLogger(__name__)

_PIECE = 1 << 20
_DRAFTS = 256
"""Files that `write_all` has open at once."""


# --- whole or not at all ---------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, content: str | bytes, *, durable: bool = True) -> Path:
    """Write a file atomically: readers, also after a power cut, see the old content or the new, never a part.

    The folder is made if it is missing. An error that may pass (`TRANSIENT`) is tried again.

    Args:
        path: File to write.
        content: Its new content; text is written as UTF-8.
        durable: Sync the content to disk before the rename. False leaves that to the caller (`sync_disk`), who may
            write many files.

    Returns:
        The path.
    """
    path = Path(path)

    def write() -> None:
        # The content is synced before the rename. The other way round,
        # a power cut could leave the new name with an empty file.
        with _draft(path, content, durable=durable) as draft:
            os.replace(draft, path)

    retried(write)
    return path


def write_all(contents: Mapping[Path, str]) -> None:
    """Write many files of one folder, each atomically, with one sync for up to `_DRAFTS` of them.

    On a slow file system a sync takes as long for one file as for a hundred.
    """
    if len(contents) < 2:
        for path, content in contents.items():
            write_atomic(path, content)
        return
    waiting = list(contents.items())
    # A sync of the whole file system replaces hundreds of single
    # ones; on a network file system each costs milliseconds.
    while waiting:  # each draft is an open file until it has its name
        some, waiting = waiting[:_DRAFTS], waiting[_DRAFTS:]
        with contextlib.ExitStack() as stack:
            drafts = {path: stack.enter_context(_draft(path, content, durable=False)) for path, content in some}
            sync_disk(some[0][0].parent)
            for path, draft in drafts.items():
                os.replace(draft, path)


def write_new(path: str | Path, content: str | bytes, *, durable: bool = True) -> Path:
    """Write a file atomically that must not exist yet; arguments and result as in `write_atomic`.

    Raises:
        FileExistsError: The file exists; it is left as it is.
    """
    path = Path(path)
    with _draft(path, content, durable=durable) as draft:
        name_new(draft, path)
    return path


def name_new(draft: str | Path, path: str | Path) -> None:
    """Give a finished draft its final name, unless another file has it.

    A hard link tests and names in one operation. FUSE mounts of buckets, FAT and some SMB shares have no links: there
    an empty file is created exclusively first, and the draft replaces it.

    Raises:
        FileExistsError: The name is taken; the file that has it is left as it is.
    """
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # A reader may see the empty file for an instant: this is the price of a file system without links.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(draft, path)


NO_LINKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)
"""Errors by which a file system says that it makes no hard links."""
TRANSIENT = (errno.ESTALE, errno.EIO, errno.EBUSY, errno.ETIMEDOUT)
"""Errors of network file systems that often pass: a server that fails over, a handle that another client replaced."""
WAITS_S = (0.1, 0.5, 2.0)
"""Seconds before each further attempt."""


def retried(action: Callable[[], T], errors: tuple[int, ...] = TRANSIENT) -> T:
    """The result of `action`, which is called again, up to three times, when it fails with an error that may pass.

    Args:
        action: A function of no arguments that may raise OSError.
        errors: Error numbers after which it is called again.
    """
    # The last attempt is outside of the loop, so that its error reaches the caller as it is.
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
    """Remove a folder with its content; returns whether that worked.

    On NFS a folder cannot be removed while another process has a file of it open (ENOTEMPTY, EBUSY). A warning is
    logged and the folder is left for a later attempt, because it is no reason to end a run.
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


def check_writable(folder: str | Path) -> None:
    """Make a folder, and write to it once: whoever may not is told before hours of work, and not after them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _draft(path: Path, content: str | bytes, *, durable: bool) -> Iterator[Path]:
    """A context with a written, locked draft of `path`. The block renames it; a draft that remains is removed."""
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
    """A new file beside `path` to write and rename. The lock on it tells other processes that its writer is alive."""
    # Drafts that end in `.part` carry their writer's lock; those in `.tmp` do not, and are judged by their age.
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
            # Between opening and locking, `remove_drafts` may have removed
            # the name: then this is a file that nobody can rename.
            if os.stat(draft).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


@contextlib.contextmanager
def whole_file(path: str | Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A context with a temporary path, for a library that writes to a file by its name.

    When the block ends without an error, the file is synced and renamed to `path`; otherwise it is removed. The folder
    is made if it is missing.
    """
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
    """A context for a library that writes a file: its errors about a full disk, a quota or a limit become `OSError`.

    safetensors has the system's error number in its message. torch.save hides it, so a further write to the file finds
    it out.
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
            # A disk that was full for the library is full for these
            # bytes too, and this attempt says so in the system's words.
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
    """The umask of this process. It is read from /proc, because the system call that returns it also sets it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def draft_name(path: Path) -> Path:
    """A hidden name beside `path` that no other writer, on whatever host, uses."""
    # Host, process and time: several nodes may write drafts of one file into a shared folder at the same instant.
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}.tmp")


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A context with a new folder under a temporary name, which replaces `folder` when the block ends without an error.

    Its files are synced before it gets its final name. When the block raises, it is removed.
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
            # Folders cannot be replaced by one rename. The old one is kept until the
            # new one has its name, so a crash between the two renames loses neither.
            os.rename(folder, stale)
            os.rename(draft, folder)
            remove_tree(stale)
        else:
            os.rename(draft, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(folder: str | Path, older_than_s: float = 3600.0) -> int:
    """Remove the drafts that killed writers left in a folder, on any host; returns their number.

    Args:
        folder: The folder.
        older_than_s: Age in seconds below which drafts without a lock (folders, and files that a library writes by
            name) are left, because their writer may be alive.
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
    """Sync a file's content to disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Sync a folder to disk: the names of its files and their renames."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_disk(folder: str | Path) -> None:
    """Sync the whole file system that holds a folder: one call for thousands of files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Python has `os.sync` for all file systems of the machine, and none for a single one.
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


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
