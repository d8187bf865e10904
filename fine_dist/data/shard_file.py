"""One shard of a reader, which is opened and checked at its first read and closed when no read uses it any more."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace

from fine_dist.core.errors import DataError
from fine_dist.core.files import sha256_of
from fine_dist.data.manifest import Manifest, ShardInfo
from fine_dist.data.records import BLOCK, record_key
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import open_shard
from fine_dist.data.tar_index import ShardIndex, TarError, index_tar

Indexes = dict[str, tuple[tuple[int, int, int], ShardIndex]]
"""By a shard's name: (size, modification time, inode) of the indexed file, and its index."""


class Shard:
    """One shard, which is opened at its first read.

    Attributes:
        fault: Why the shard cannot be used; None if it can.
        index: Offsets of the samples in a tar of another program; None if all records have the same size.
        regular: Whether the shard can be used and all its records have the same size.
    """

    def __init__(
        self, url: str, info: ShardInfo, manifest: Manifest, config: DataConfig, indexes: Indexes | None = None
    ) -> None:
        self.url, self.info = url, info
        self.fault: str | None = None
        self.index: ShardIndex | None = None
        self.regular = False
        self.fd = -1
        self._manifest, self._config = manifest, config
        self._indexes: Indexes = {} if indexes is None else indexes
        self._lock = threading.Lock()
        self._opened = False

    def ready(self) -> Shard:
        """Open the shard unless it is open, while other threads wait. `DataError` when a remote shard cannot be
        copied."""
        # Checked without the lock first, so that threads do not wait for each other once the shard is open.
        if not self._opened:
            with self._lock:
                if not self._opened:
                    self.fault = self._open()
                    self.regular = self.fault is None and self.index is None
                    self._opened = True
        return self

    def _open(self) -> str | None:
        """Open the file; returns why it cannot be used, or None."""
        try:
            self.fd = open_shard(self.url, self.info, self._config)
        except (FileNotFoundError, NotADirectoryError):
            return "the manifest lists this shard, but it is absent"
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                return f"it cannot be opened: {error.strerror}"
            raise DataError(
                f"{self.url}: too many open files; raise the limit (ulimit -n) or lower data.window or data.streams"
            ) from None
        # The size of the open file and not of its path, because the file may be replaced at any time.
        size = os.fstat(self.fd).st_size
        if self._config.verify != "none" and size != self.info.bytes:
            return f"{size} bytes, but the manifest says {self.info.bytes}: truncated or replaced"
        if self._config.verify == "sha256" and sha256_of(f"/dev/fd/{self.fd}") != self.info.sha256:
            return "its sha256 is not the manifest's: damaged or replaced"
        # The following reads are in random order, so the kernel is asked to load the file sequentially.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_WILLNEED)
        if self.info.key_prefix is not None:
            return self._count_regular(size)
        return self._find(size)

    def _count_regular(self, size: int) -> str | None:
        """Why the number of records is wrong, or None. A tar ends with a block of zeros."""
        count, stride = self.info.count, self._manifest.layout.stride
        room = size // stride
        if room < count:
            return f"the manifest says {count} samples; it has {room}"
        # The file size and two reads replace a scan of all headers: they
        # detect too few records, too many, and records of another size.
        if size >= count * stride + BLOCK and any(os.pread(self.fd, BLOCK, count * stride)):
            return f"the manifest says {count} samples; it has more, or records of another size"
        if count and not any(os.pread(self.fd, BLOCK, (count - 1) * stride)):
            return f"the manifest says {count} samples; it has fewer, or records of another size"
        return None

    def _find(self, size: int) -> str | None:
        """Index the samples of another program's tar, or reuse the index of an unchanged file."""
        stat = os.fstat(self.fd)
        # A replacement of the same size has another modification time or inode.
        version = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        known = self._indexes.get(self.info.name)
        if known and known[0] == version:
            self.index = known[1]
            return None
        try:
            self.index = self._walk(size)
        except TarError as error:
            return str(error)
        if len(self.index.keys) != self.info.count:
            return f"the manifest says {self.info.count} samples; it has {len(self.index.keys)}"
        # Cached without keys, which take most of the memory and are needed only in error messages.
        self._indexes[self.info.name] = (version, replace(self.index, keys=[]))
        return None

    def _walk(self, size: int) -> ShardIndex:
        manifest = self._manifest
        with open(self.fd, "rb", buffering=1 << 18, closefd=False) as stream:
            return index_tar(stream, size, manifest.stored_shape, manifest.dtype, manifest.num_classes)

    def key(self, number: int) -> str:
        """The key of a sample."""
        if self.index is None:
            return record_key(self.info.key_prefix or "", number)
        # Indexed again, because errors are rare and the keys of a large data set take gigabytes.
        if not self.index.keys:
            self.index = self._walk(os.fstat(self.fd).st_size)
        return self.index.keys[number]

    def __del__(self) -> None:
        # Readers hold a reference while they read, so that no file is closed during a read.
        if self.fd >= 0:
            os.close(self.fd)
