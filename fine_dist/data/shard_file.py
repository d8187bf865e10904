"""One open shard of a reader: it is opened and checked when it is first read, and closed when no read uses it."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace

from fine_dist.core.errors import DataError
from fine_dist.core.files import sha256_of
from fine_dist.data.records import BLOCK, record_key
from fine_dist.data.settings import DataConfig
from fine_dist.data.shards import Manifest, ShardInfo
from fine_dist.data.sources import open_shard
from fine_dist.data.tar_index import ShardIndex, TarError, index_tar

Indexes = dict[str, tuple[tuple[int, int, int], ShardIndex]]
"""By a shard's name: size, time of change and inode of the file that was walked, and what was found there."""


class Shard:
    """One shard, which is opened when it is first read.

    Attributes:
        fault: Why the whole shard cannot be used; None: it can.
        index: Offsets of its samples, for a tar of another program; None: all records have one size.
        regular: Whether it can be used and all its records have one size.
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
        """Open the shard, once; other threads wait meanwhile. `DataError` when a remote shard cannot be copied."""
        # Checked without the lock first: once it is open, which is nearly always, no thread waits for another.
        if not self._opened:
            with self._lock:
                if not self._opened:
                    self.fault = self._open()
                    self.regular = self.fault is None and self.index is None
                    self._opened = True
        return self

    def _open(self) -> str | None:
        """Open the file and return what is wrong with it."""
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
        # Of the open file, not of its name: a file that is replaced meanwhile cannot mix with this one.
        size = os.fstat(self.fd).st_size
        if self._config.verify != "none" and size != self.info.bytes:
            return f"{size} bytes, but the manifest says {self.info.bytes}: truncated or replaced"
        if self._config.verify == "sha256" and sha256_of(f"/dev/fd/{self.fd}") != self.info.sha256:
            return "its sha256 is not the manifest's: damaged or replaced"
        # ask the system to bring the file in one sweep: the reads that follow are in random order
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_WILLNEED)
        if self.info.key_prefix is not None:
            return self._count_regular(size)
        return self._find(size)

    def _count_regular(self, size: int) -> str | None:
        """What is wrong with the number of records, or None. A tar ends with a block of zeros."""
        count, stride = self.info.count, self._manifest.layout.stride
        room = size // stride
        if room < count:
            return f"the manifest says {count} samples; it has {room}"
        # The file's size and two reads replace a walk over all headers:
        # they tell too few, too many, and records of another size.
        if size >= count * stride + BLOCK and any(os.pread(self.fd, BLOCK, count * stride)):
            return f"the manifest says {count} samples; it has more, or records of another size"
        if count and not any(os.pread(self.fd, BLOCK, (count - 1) * stride)):
            return f"the manifest says {count} samples; it has fewer, or records of another size"
        return None

    def _find(self, size: int) -> str | None:
        """Index the samples of a tar that another program wrote; the index of an unchanged file is used again."""
        stat = os.fstat(self.fd)
        # A file that was replaced by one of the same size still has another time or inode.
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
        # without its keys, which are most of its memory and are asked for in error messages alone
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
        # Walked once more, because an error message is rare and the keys of a large data set are gigabytes.
        if not self.index.keys:
            self.index = self._walk(os.fstat(self.fd).st_size)
        return self.index.keys[number]

    def __del__(self) -> None:
        # readers hold the object while they read, so the file is closed under nobody
        if self.fd >= 0:
            os.close(self.fd)
