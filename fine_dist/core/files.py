"""Atomic and durable writes, the modes of new files, and hashes of files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fine_dist.core.regular_files import open_regular
from fine_dist.core.retry import remove_tree, retry
from fine_dist.core.temp_files import open_temp_file, temp_path

_CHUNK_BYTES = 1 << 20
_MAX_OPEN_FILES = 256
"""Temporary files that `write_all` has open at once."""


# --- atomic writes ---------------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, content: str | bytes, *, durable: bool = True) -> Path:
    """Write a file atomically: readers, also after a power cut, see the old content or the new, never a part.

    The folder is created if it is missing. After a transient error (`retry.TRANSIENT`) the write is tried again.

    Args:
        path: File to write.
        content: Its new content; text is written as UTF-8.
        durable: Sync the content to disk before the rename. With False the caller syncs (`sync_disk`), which is faster
            for many files.

    Returns:
        The path.
    """
    path = Path(path)

    def write() -> None:
        # The content is synced before the rename. The other way round,
        # a power cut could leave the new name with an empty file.
        with _temp_file(path, content, durable=durable) as temp:
            os.replace(temp, path)

    retry(write)
    return path


def write_all(contents: Mapping[Path, str]) -> None:
    """Write many files of one folder, each atomically, with one sync for up to `_MAX_OPEN_FILES` of them.

    On a slow file system a sync takes as long for one file as for a hundred.
    """
    if len(contents) < 2:
        for path, content in contents.items():
            write_atomic(path, content)
        return
    remaining = list(contents.items())
    # One sync of the whole file system replaces hundreds of syncs of
    # single files; on a network file system each costs milliseconds.
    while remaining:
        batch, remaining = remaining[:_MAX_OPEN_FILES], remaining[_MAX_OPEN_FILES:]
        with contextlib.ExitStack() as stack:
            temps = {path: stack.enter_context(_temp_file(path, content, durable=False)) for path, content in batch}
            sync_disk(batch[0][0].parent)
            for path, temp in temps.items():
                os.replace(temp, path)


def write_new(path: str | Path, content: str | bytes, *, durable: bool = True) -> Path:
    """Write a file atomically that must not exist yet; arguments and result as in `write_atomic`.

    Raises:
        FileExistsError: The file exists; it is left as it is.
    """
    path = Path(path)
    with _temp_file(path, content, durable=durable) as temp:
        rename_new(temp, path)
    return path


def rename_new(temp: str | Path, path: str | Path) -> None:
    """Rename a finished temporary file to a name that must not exist yet.

    A hard link tests and names in one operation. FUSE mounts of buckets, FAT and some SMB shares have no hard links:
    there an empty file is created exclusively first, and the temporary file replaces it.

    Raises:
        FileExistsError: The name exists; its file is left as it is.
    """
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # A reader may see the empty file for an instant: this is the price of a file system without links.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temp, path)


NO_LINKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK)
"""Errors of file systems that have no hard links."""


def check_writable(folder: str | Path) -> None:
    """Create a folder and write to it once, so that missing permission is an error before hours of work, not after.

    Raises:
        OSError: The folder cannot be created or written to.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextlib.contextmanager
def _temp_file(path: Path, content: str | bytes, *, durable: bool) -> Iterator[Path]:
    """A context with a written, locked temporary file for `path`, to be renamed in it; otherwise it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BufferedWriter(open_temp_file(path)) as file:
        temp = Path(file.raw.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            yield temp
        finally:
            temp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: str | Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A context with a temporary path, for a library that writes to a file by its name.

    When the block ends without an error, the file is synced and renamed to `path`; otherwise it is removed. The folder
    is created if it is missing.

    Args:
        path: The final file.
        suffix: Suffix of the temporary path, for libraries that derive a format from it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(path).with_suffix(suffix)
    try:
        yield temp
        apply_umask(temp)
        sync_file(temp)
        os.replace(temp, path)
        sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def library_write(path: str | Path) -> Iterator[None]:
    """A context for a library that writes a file: its errors about a full disk, a quota or a limit become `OSError`.

    The new file also gets the mode that the umask gives (`apply_umask`). safetensors has the system's error number in
    its message. torch.save hides it, so a further write to the file is made, which fails with that number.
    """
    try:
        yield
        apply_umask(path)
    except OSError:
        raise
    except Exception as error:
        if match := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None
        if Path(path).is_file():
            # A disk that was full for the library is full for these
            # bytes too, and this write raises the system's own error.
            with open(path, "ab") as file:
                file.write(bytes(_CHUNK_BYTES))
                file.flush()
                os.fsync(file.fileno())
        raise


def apply_umask(path: str | Path) -> None:
    """Give a new file the mode that `open` would give it: rw-rw-rw- without the bits of the umask.

    safetensors renames a private temporary file, whose mode 0600 stays: colleagues could not read the model.
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


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A context with a new folder under a temporary name. It replaces `folder` when the block ends without an error.

    Its files are synced before it gets its final name. When the block raises, it is removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(folder)
    temp.mkdir()
    try:
        yield temp
        for path in temp.rglob("*"):
            if path.is_file():
                apply_umask(path)
                sync_file(path)
        if folder.exists():
            stale = temp_path(folder)
            # Folders cannot be replaced by one rename. The old one is kept until the
            # new one has its name, so a crash between the two renames loses neither.
            os.rename(folder, stale)
            os.rename(temp, folder)
            remove_tree(stale)
        else:
            os.rename(temp, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


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
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
