"""Where shards come from: local paths, and through webdataset's openers everything else (http, s3, gs, hf, pipe).

A remote shard is copied whole into an unnamed temporary file before it is read, so that a shuffle window costs disk and
not memory, and a process that is killed leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
from typing import BinaryIO

import webdataset as wds

from fine_dist.config import DataConfig, expand_path
from fine_dist.data.shards import MANIFEST, Manifest
from fine_dist.errors import DataError

_PIECE = 1 << 20


def is_remote(url: str) -> bool:
    """Whether webdataset's openers are needed; `file:` and plain paths are local."""
    return not url.startswith("file:") and ("://" in url or url.startswith("pipe:"))


def local_path(url: str) -> str:
    """A local path from a plain path or a `file:` URL."""
    return expand_path(url.removeprefix("file://").removeprefix("file:"))


def locate(where: str, config: DataConfig) -> tuple[Manifest, str]:
    """The manifest of a set of shards, and the folder or URL in front of their names.

    where: a folder or URL with a manifest.json in it, that file itself, or a brace pattern of some of its shards.
    """
    name = where.rsplit("/", 1)[-1]
    base = where.rstrip("/")
    chosen: list[str] = []
    if name == MANIFEST or name.endswith(".tar"):
        base = where[: -len(name)].rstrip("/") or ("/" if where.startswith("/") else ".")
    if name.endswith(".tar"):
        chosen = [url.rsplit("/", 1)[-1] for url in wds.shardlists.expand_urls(where)]
    if is_remote(base):
        text = read_bytes(f"{base}/{MANIFEST}", config)
    else:
        base = local_path(base)
        try:
            with open(os.path.join(base, MANIFEST), "rb") as stream:
                text = stream.read()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(_no_manifest(base)) from None
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
        return f"{base}: there is no such folder of shards; make one with `python -m fine_dist.encode`"
    tars = sum(name.endswith(".tar") for name in os.listdir(base))
    if tars:
        return (
            f"{base}: {tars} tar files but no {MANIFEST}; write one with "
            f"`python -m fine_dist.encode --index {base} --num-classes N --scaling-factor F`"
        )
    return f"{base}: no {MANIFEST} and no shards; make some with `python -m fine_dist.encode`"


def read_bytes(url: str, config: DataConfig) -> bytes:
    """A small remote file as bytes."""
    with tempfile.TemporaryFile() as stream:
        copy(url, stream, config)
        stream.seek(0)
        return stream.read()


def copy(url: str, to: BinaryIO, config: DataConfig) -> int:
    """Copy a remote file into an open one; returns its size. `DataError` when it cannot be had."""
    size = 0
    try:
        with wds.gopen(url) as stream:
            while piece := stream.read(_PIECE):
                to.write(piece)
                size += len(piece)
    except OSError as error:
        raise DataError(f"{url}: cannot be read: {error}") from None
    to.flush()
    return size
