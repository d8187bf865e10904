"""Coordination of encoding processes, which share only the folder that they write to.

A process holds a lock on the unit that it encodes and writes a small file when the unit is done. The process that
finishes last writes the manifest and removes these files. The kernel releases the lock of a killed process, so that
another process encodes its unit again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from fine_dist.core.errors import DataError
from fine_dist.core.files import rename_new, write_atomic
from fine_dist.core.json_files import read_json
from fine_dist.core.regular_files import read_bytes
from fine_dist.core.temp_files import open_temp_file, remove_stale_temp_files
from fine_dist.data.codecs import Codec, TokenEncoder
from fine_dist.data.images import ImageSource
from fine_dist.data.manifest import MANIFEST, SHARD_NAME, BadInput, Manifest, ShardInfo, TokenInfo

_SETTINGS, _MERGING = ".encode.json", ".merge.lock"
_MOST_NAMES = 1000
"""Maximum number of names of left-out files in a manifest."""


@dataclass(frozen=True)
class EncodeJob:
    """How to encode. `settings` must be the same when an interrupted encoding is resumed."""

    folder: Path
    settings: dict[str, Any]
    kind: str = "sample"
    flips: bool = False
    dtype: str = "float16"
    seed: int = 0
    batch: int = 32
    workers: int = 4
    max_bad_fraction: float = 0.001
    normalize_channels: bool = False
    scaled_like: Path | None = None
    """Folder of the training shards, whose scaling replaces the codec's. None: the codec's scaling."""
    tokens: TokenEncoder | None = None
    """Image encoder whose tokens are stored with the latents. None: no tokens."""
    tokens_dtype: Literal["float16", "float32"] = "float16"


def finished_manifest(folder: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a complete encoding; None while it is incomplete.

    Raises:
        DataError: It was made with other settings.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = Manifest.parse(read_bytes(path), str(path))
    made_by = {key: value for key, value in manifest.made_by.items() if key != "fingerprint"}
    _check_same_settings(made_by, json.loads(json.dumps(settings)), folder)
    remove_stale_temp_files(folder)
    return manifest


def record_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings of the encoding in this folder, or compare them with those that another process recorded.

    Raises:
        DataError: They differ.
    """
    path = folder / _SETTINGS
    remove_stale_temp_files(folder)
    # The file is complete before it gets its name, so that a process which finds it can compare settings at once.
    with open_temp_file(path) as draft:
        draft.write(json.dumps(settings, indent=1).encode())
        try:
            # `rename_new` succeeds in exactly one of several processes; the others compare with its file.
            rename_new(draft.name, path)
        except FileExistsError:
            _check_same_settings(_read_mark(path), json.loads(json.dumps(settings)), folder)
        finally:
            Path(draft.name).unlink(missing_ok=True)


def _read_mark(path: Path) -> Any:
    """Read the JSON of a coordination file. `DataError` when it is damaged."""
    return read_json(path, DataError, "delete it, and encode again")


def _check_same_settings(recorded: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    different = sorted(key for key in {*recorded, *wanted} if recorded.get(key) != wanted.get(key))
    if different:
        key = different[0]
        raise DataError(
            f"{folder} holds latents made with other settings: {', '.join(different)} "
            f"({key} was {recorded.get(key)!r}, now {wanted.get(key)!r}); choose another out, or delete that folder"
        )


class UnitDone(BaseModel):
    """The record of a finished unit, stored until the manifest is written."""

    model_config = ConfigDict(extra="forbid")

    shard: ShardInfo | None
    """Entry of the shard. None: no image of the unit could be read."""
    bad: tuple[BadInput, ...]
    largest_label: int
    shape: tuple[int, ...] | None
    """Shape of a stored latent."""
    tokens_shape: tuple[int, int, int] | None = None
    """Shape of the stored tokens."""
    sums: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Number of values, their sum and their sum of squares, each by channel."""


def mark_done(folder: Path, unit: int, done: UnitDone) -> None:
    """Record that a unit is finished."""
    write_atomic(_done_path(folder, unit), done.model_dump_json())


def _read_done(folder: Path, unit: int) -> UnitDone:
    path = _done_path(folder, unit)
    try:
        return UnitDone.model_validate_json(path.read_bytes())
    except ValidationError as error:
        what = error.errors()[0]["msg"]
        raise DataError(f"{path} is damaged: {what}; delete it, and encode again") from None


def is_done(folder: Path, unit: int) -> bool:
    """Whether a unit is done."""
    # In this order, because records of units are removed only after the manifest is written.
    return _done_path(folder, unit).exists() or (folder / MANIFEST).exists()


def count_done(folder: Path, units: int) -> int:
    """Number of units that any process has finished."""
    if (folder / MANIFEST).exists():
        return units
    return sum(name.startswith(".latents-") and name.endswith(".tar.json") for name in os.listdir(folder))


def _done_path(folder: Path, unit: int) -> Path:
    return folder / f".{SHARD_NAME.format(unit)}.json"


def _lock_path(folder: Path, unit: int) -> Path:
    return folder / f".{SHARD_NAME.format(unit)}.lock"


class UnitClaims:
    """An iterator over the units that are not done, each locked until it is released.

    Units that no process holds come first; then it waits for the units of other processes. It yields None before each
    wait.
    """

    def __init__(self, folder: Path, units: int) -> None:
        self.folder, self.units = folder, units
        self._held: dict[int, int] = {}

    def __iter__(self) -> Iterator[int | None]:
        busy = []
        for unit in range(self.units):
            if is_done(self.folder, unit):
                continue
            # Free units first. Only when none is left does this process wait
            # for the units of other processes, any of which may be killed.
            if not self._lock(unit, fcntl.LOCK_NB):
                busy.append(unit)
            elif self._is_open(unit):
                yield unit
        for unit in busy:
            yield None
            self._lock(unit, 0)
            if self._is_open(unit):
                yield unit

    def _lock(self, unit: int, flags: int) -> bool:
        fd = os.open(self._path(unit), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | flags)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError as error:
            os.close(fd)
            raise DataError(
                f"{self.folder}: this file system has no locks ({error.strerror}); choose an out on one that has"
            ) from None
        self._held[unit] = fd
        return True

    def _is_open(self, unit: int) -> bool:
        """Whether a unit that was just locked still has to be encoded; removes the draft of a killed process."""
        if is_done(self.folder, unit):
            self.release(unit)
            return False
        # This process holds the lock, so the draft's writer has ended, however new the file is.
        for leftover in self.folder.glob(f".{SHARD_NAME.format(unit)}.*.part"):
            leftover.unlink()
        return True

    def _path(self, unit: int) -> Path:
        return _lock_path(self.folder, unit)

    def release(self, unit: int) -> None:
        """Release a unit; if it is done, its lock file is removed."""
        if is_done(self.folder, unit):
            # Removed while it is still locked. A process that has it open already finds the unit done and releases it.
            self._path(unit).unlink(missing_ok=True)
        os.close(self._held.pop(unit))

    def close(self) -> None:
        """Release all units."""
        for unit in list(self._held):
            self.release(unit)


def merge(source: ImageSource, codec: Codec, job: EncodeJob) -> Manifest:
    """Write the manifest from the records of all units, unless it exists; returns it.

    Raises:
        DataError: Too many images were unreadable.
    """
    with open(job.folder / _MERGING, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = job.folder / MANIFEST
        if path.exists():
            manifest = Manifest.parse(read_bytes(path), str(path))
            _remove_coordination_files(job.folder, source.units)
            return manifest
        # Every process computes the same manifest from the same records, so it does not matter which one writes it.
        parts = [_read_done(job.folder, unit) for unit in range(source.units)]
        bad = [each for part in parts for each in part.bad]
        shards = tuple(part.shard for part in parts if part.shard)
        count = sum(shard.count for shard in shards)
        images = len(bad) + count // (2 if job.flips else 1)
        if not count or len(bad) > job.max_bad_fraction * images:
            raise DataError(too_many_bad_images(job, len(bad), images, bad[-1] if bad else None))
        channels, height, width = next(part.shape for part in parts if part.shape)
        count_C, sum_C, square_C = np.sum([part.sums for part in parts if part.shard], axis=0)
        # The sums of all units give exact statistics without a second pass over the shards.
        mean_C = sum_C / count_C
        std_C = np.sqrt(np.maximum(square_C / count_C - mean_C**2, 0))
        manifest = Manifest(
            count=count,
            latent_shape=(channels // 2 if job.kind == "moments" else channels, height, width),
            kind=job.kind,
            dtype=job.dtype,
            **_scaling(job, codec, mean_C, std_C),
            tokens=_tokens(job, [part.tokens_shape for part in parts if part.tokens_shape]),
            channel_mean=tuple(mean_C.tolist()),
            channel_std=tuple(std_C.tolist()),
            num_classes=source.num_classes or 1 + max(part.largest_label for part in parts),
            class_names=source.class_names,
            flips=job.flips,
            codec=codec.name,
            source=str(job.settings.get("source", "")),
            made_by={**job.settings, "fingerprint": source.fingerprint},
            shards=shards,
            bad=tuple(bad),
            left_out=source.left_out[:_MOST_NAMES],
            num_left_out=len(source.left_out),
        )
        manifest.save(job.folder)
        _remove_coordination_files(job.folder, source.units)
        return manifest


def _tokens(job: EncodeJob, shapes: list[tuple[int, int, int]]) -> TokenInfo | None:
    """The manifest's entry of the image encoder's tokens."""
    if job.tokens is None:
        return None
    return TokenInfo(encoder=job.tokens.name, sha256=job.tokens.identity, shape=shapes[0], dtype=job.tokens_dtype)


def _scaling(job: EncodeJob, codec: Codec, mean_C: np.ndarray, std_C: np.ndarray) -> dict[str, Any]:
    """The manifest's fields for the scaling that the stream applies."""
    scale, shift = codec.scaling_factor, codec.shift_factor
    if job.scaled_like is not None:
        path = job.scaled_like / MANIFEST
        train = Manifest.parse(read_bytes(path), str(path))
        scale, shift = train.scale, train.shift
    elif job.normalize_channels:
        if not std_C.all():
            raise DataError(f"normalize_channels: channel {int(std_C.argmin())} has the same value everywhere")
        scale, shift = tuple((1 / std_C).tolist()), tuple(mean_C.tolist())
    if isinstance(scale, tuple) or isinstance(shift, tuple):
        both = (np.broadcast_to(each, len(mean_C)).tolist() for each in (scale, shift))
        return dict(zip(("channel_scale", "channel_shift"), map(tuple, both)))
    return {"scaling_factor": scale, "shift_factor": shift}


def _remove_coordination_files(folder: Path, units: int) -> None:
    """Remove the files that only a running encoding needs, including those of killed processes."""
    for unit in range(units):
        _done_path(folder, unit).unlink(missing_ok=True)
        _lock_path(folder, unit).unlink(missing_ok=True)
    for name in (_SETTINGS, _MERGING):
        (folder / name).unlink(missing_ok=True)
    remove_stale_temp_files(folder)


def too_many_bad_images(job: EncodeJob, bad: int, count: int, last: BadInput | None) -> str:
    """The error message for `bad` unreadable images among `count`, with the last one as an example."""
    example = f"; the last: {last.source}: {last.error}" if last else ""
    return (
        f"{bad} of {count} images cannot be read, more than max_bad_fraction {job.max_bad_fraction:g} allows{example} "
        f"(the shards that are done stay in {job.folder})"
    )
