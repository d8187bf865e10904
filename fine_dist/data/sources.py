"""Access to shards: local paths, and webdataset's openers for everything else (http, s3, gs, hf, pipe).

A remote shard is copied completely before it is read: into the cache if there is one, else into an unnamed temporary
file. A shuffle window therefore costs disk space and not memory, and a killed process leaves no files behind. A copy
that stalls, breaks off or has the wrong size is retried.
"""

from __future__ import annotations

import math
import os
import re
import select
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, BinaryIO

import webdataset as wds
from webdataset.gopen import gopen_schemes

from fine_dist.core.config import expand_path
from fine_dist.core.errors import DataError, NotAFile
from fine_dist.core.files import sha256_of
from fine_dist.core.regular_files import descriptor_of, open_regular
from fine_dist.data.cache import Cache
from fine_dist.data.manifest import MANIFEST, Manifest, ShardInfo
from fine_dist.data.settings import DataConfig

_PIECE = 1 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
"""Shortest and longest pause before a retry; the pause doubles each time."""


def is_remote(url: str) -> bool:
    """Whether a URL needs webdataset's openers; `file:` URLs and plain paths are local."""
    return not url.startswith("file:") and ("://" in url or url.startswith("pipe:"))


def local_path(url: str) -> str:
    """The local path of a plain path or a `file:` URL."""
    return expand_path(url.removeprefix("file://").removeprefix("file:"))


MAX_SHARDS = 1_000_000
"""Maximum number of names of a brace pattern: enough for a billion latents in shards of a thousand."""


def expand_braces(pattern: str) -> list[str]:
    """Expand a pattern such as `data-{000..127}.tar` into names.

    The names are counted before they are expanded, because `{0..999999999}` would fill the memory.

    Raises:
        DataError: There are more than `MAX_SHARDS`.
    """
    most = 1
    for first, last, step in re.findall(r"(\d+)\.\.(\d+)(?:\.\.-?(\d+))?", pattern):
        if max(len(first), len(last)) > 18:
            most = MAX_SHARDS + 1
            break
        # An upper bound is enough, and computing it needs no memory.
        most *= abs(int(last) - int(first)) // max(1, int(step or 1)) + 1
    # A group of alternatives multiplies by their number, and nested groups by at most the number of commas.
    most *= math.prod(group.count(",") + 1 for group in re.findall(r"\{[^{}]*,[^{}]*", pattern))
    if most > MAX_SHARDS:
        raise DataError(
            f"{pattern[:200]}: this pattern stands for more than {MAX_SHARDS:,} files; name fewer, or give the folder"
        )
    names: list[str] = wds.shardlists.expand_urls(pattern)
    return names


def locate(where: str, config: DataConfig) -> tuple[Manifest, str]:
    """Read the manifest of a set of shards.

    Args:
        where: A folder or URL with a manifest.json, that file itself, or a brace pattern of some of its shards.
        config: Retries and time limits of remote reads.

    Returns:
        The manifest, of the chosen shards, and the folder or URL of the shards.

    Raises:
        DataError: There is no valid manifest, or it does not list a chosen shard.
    """
    name = where.rsplit("/", 1)[-1]
    base = where.rstrip("/")
    chosen: list[str] = []
    if name == MANIFEST or name.endswith(".tar"):
        base = where[: -len(name)].rstrip("/") or ("/" if where.startswith("/") else ".")
    if name.endswith(".tar"):
        chosen = [url.rsplit("/", 1)[-1] for url in expand_braces(where)]
    if is_remote(base):
        try:
            text = read_bytes(f"{base}/{MANIFEST}", config)
        except FileNotFoundError as error:
            raise DataError(f"{error}; give the folder of shards that have a {MANIFEST}") from None
    else:
        base = local_path(base)
        try:
            with open_regular(os.path.join(base, MANIFEST)) as stream:
                text = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_no_manifest(base)) from None
        except NotAFile as error:
            raise DataError(f"{base}/{MANIFEST} {error.strerror}; copy the manifest there") from None
    manifest = Manifest.parse(text, f"{base}/{MANIFEST}")
    if chosen:
        known = {shard.name: shard for shard in manifest.shards}
        missing = [each for each in chosen if each not in known]
        if missing:
            raise DataError(f"{where}: {missing[0]} is not in {base}/{MANIFEST}, which lists {len(known)} shards")
        shards = tuple(known[each] for each in chosen)
        manifest = manifest.model_copy(update={"shards": shards, "count": sum(s.count for s in shards)})
    if not manifest.count:
        raise DataError(f"{where}: the manifest lists no samples")
    return manifest, base


def _no_manifest(base: str) -> str:
    if not os.path.isdir(base):
        return f"{base}: there is no such folder of shards; make one with `fine-dist encode`"
    tars = sum(name.endswith(".tar") for name in os.listdir(base))
    if tars:
        return (
            f"{base}: {tars} tar files but no {MANIFEST}; write one with "
            f"`fine-dist encode --index {base} --num-classes N --scaling-factor F`"
        )
    return f"{base}: no {MANIFEST} and no shards; make some with `fine-dist encode`"


def read_bytes(url: str, config: DataConfig) -> bytes:
    """The content of a small remote file, with the same retries as a shard."""
    with tempfile.TemporaryFile() as stream:
        copy(url, stream, config)
        stream.seek(0)
        return stream.read()


def open_shard(url: str, info: ShardInfo, config: DataConfig) -> int:
    """Open a local or remote shard; returns a file descriptor, which the caller closes.

    Raises:
        FileNotFoundError: There is no such shard.
        DataError: A remote shard could not be copied in any attempt.
    """
    if not is_remote(url):
        return descriptor_of(url)
    size = info.bytes if config.verify != "none" else None

    def check(stream: BinaryIO) -> str | None:
        stream.flush()
        if config.verify == "sha256" and sha256_of(f"/dev/fd/{stream.fileno()}") != info.sha256:
            return "its sha256 is not the manifest's"
        return None

    if config.cache_dir:
        cache = Cache(expand_path(config.cache_dir), config.cache_bytes)
        # Named by content, so that data sets whose shards have equal names can share a cache.
        name = f"{info.sha256[:16]}-{info.name}"
        fd = cache.open(name, info.bytes, lambda stream: copy(url, stream, config, size, check))
        if fd is not None:
            return fd
    with tempfile.TemporaryFile(prefix="fine_dist-") as stream:
        copy(url, stream, config, size, check)
        # The file has no name: the system frees it when this descriptor is closed or the process ends.
        return os.dup(stream.fileno())


def copy(
    url: str,
    to: BinaryIO,
    config: DataConfig,
    size: int | None = None,
    check: Callable[[BinaryIO], str | None] | None = None,
) -> None:
    """Copy a remote file into an open one, with `config.retries` further attempts after the first.

    Args:
        url: The remote file.
        to: File to write into, from its beginning.
        config: Retries and time limits.
        size: Size in bytes that the copy must have. None: any.
        check: Returns the problem of a copy, or None.

    Raises:
        FileNotFoundError: The server says that the file does not exist.
        DataError: All attempts failed.
    """
    pause, problem = _FIRST_PAUSE_S, ""
    for attempt in range(1 + config.retries):
        if attempt:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        to.seek(0)
        try:
            num_bytes = _copy_once(url, to, config.timeout_s)
        except DataError:
            raise
        except Exception as error:  # openers of other libraries raise their own types of errors
            problem = _error_summary(error)
            if _is_absent(url):
                raise FileNotFoundError(f"{url}: the server says that it is not there") from None
            continue
        # An earlier attempt may have left more bytes than this one wrote.
        to.truncate(num_bytes)
        wrong = f"{num_bytes} bytes came, not {size}" if size is not None and num_bytes != size else check and check(to)
        if not wrong:
            return
        problem = wrong
    raise DataError(
        f"{url}: cannot be read after {1 + config.retries} attempts: {problem} "
        "(data.retries and data.timeout_s say how long to try)"
    )


def _copy_once(url: str, to: BinaryIO, timeout_s: float) -> int:
    """Copy in one attempt; returns the number of bytes. `TimeoutError` after `timeout_s` seconds without a byte."""
    scheme = url.partition("://")[0]
    if scheme == "s3" and "s3" not in gopen_schemes:
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    elif scheme not in gopen_schemes and not url.startswith("pipe:"):
        raise DataError(f"{url}: no opener for {scheme!r}; legal: {', '.join(sorted({*gopen_schemes, 's3'}))}")
    stream = wds.gopen(url)
    process = getattr(stream, "proc", None)
    size = 0
    try:
        while piece := _next_bytes(stream, process is not None, timeout_s):
            to.write(piece)
            size += len(piece)
    except BaseException:
        if process is not None:
            # curl or aws would continue to download although nobody reads the pipe.
            process.kill()
            stream.ignore_errors = True
        stream.close()
        raise
    stream.close()
    return size


_CURL = {6: "the host name is not known", 7: "the host refuses the connection", 22: "the server answers with an error"}
"""Meaning of exit codes of curl, which webdataset uses for http."""


def _error_summary(error: Exception) -> str:
    """The reason of a failed read in one line. A pipe's own error is its command line and the exit code."""
    text = str(error).strip() or type(error).__name__
    code = re.search(r"exit (\d+) \(", text)
    if code is None:
        return text.partition("\n")[0][:300]
    if "curl" in text and int(code[1]) in _CURL:
        return _CURL[int(code[1])]
    return f"the program that reads it failed (exit {code[1]})"


def _next_bytes(stream: Any, is_pipe: bool, timeout_s: float) -> bytes:
    """The next available bytes. Openers other than pipes have their own time limits."""
    if not is_pipe:
        return stream.read(_PIECE)
    fd = stream.stream.fileno()
    # A pipe has no timeout, and a server may stop sending without closing the connection.
    if not select.select([fd], [], [], timeout_s)[0]:
        raise TimeoutError(f"no byte for {timeout_s:g} s")
    return os.read(fd, _PIECE)


def _is_absent(url: str) -> bool:
    """Whether an http server answers that the file does not exist, which the opener's error does not state."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            return False
    except urllib.error.HTTPError as error:
        return error.code in (404, 410)
    except OSError:
        return False
