"""The state of a pack's jobs on disk: two safetensors files for each pack, from which any other pack can resume a job.

A save replaces the older of the two files, so the newer one stays intact. Every job's tensors have their own hash. A
pack reads the states of its own jobs only, renames a damaged file, and resumes from the next best state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fine_dist.core.errors import CheckpointError, DamagedStateError
from fine_dist.core.files import atomic_file
from fine_dist.core.json_files import MAX_JSON_BYTES, Record, as_record, parse_json
from fine_dist.core.regular_files import open_regular

log = logging.getLogger(__name__)

FORMAT = "2"
SUFFIX = ".state.safetensors"
DAMAGED = ".damaged"

JobState = tuple[str, dict[str, Tensor], dict[str, Any]]
"""(key, tensors, JSON values) of a job; `step` is one of the values."""


def write_states(folder: Path, pack: str, states: Mapping[str, JobState]) -> Path:
    """Write the states of a pack's jobs, by name, over the older of its two files; returns that file."""
    # The newer file is not touched, so that it stays intact if this save is interrupted.
    path = min((folder / f"{pack}.{side}{SUFFIX}" for side in "ab"), key=_age)
    tensors = {f"{name}/{part}": x.contiguous() for name, (_, parts, _) in states.items() for part, x in parts.items()}
    # One hash for each job and not for the file: a flipped bit damages the newest state of one job only.
    about = {name: {"key": key, "values": values, "sha256": digest(t)} for name, (key, t, values) in states.items()}
    with atomic_file(path) as draft:
        save_file(tensors, draft, metadata={"format": FORMAT, "jobs": json.dumps(about)})
    return path


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return -1.0


def read_states(
    folder: Path, pack: str, keys: Mapping[str, str]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """The furthest intact state of every named job that any pack in `folder` has saved: (tensors, values).

    Args:
        folder: Folder of the state files of a family's packs. An unreadable file is renamed to `NAME.damaged`, with a
            warning; other jobs are not affected.
        pack: Name of the pack that the jobs are in now.
        keys: The key of every requested job, by its name.

    Raises:
        DamagedStateError: A job has no intact state, and a damaged file held one.
        CheckpointError: A job of this name was saved for other settings.
    """
    offers: dict[str, list[tuple[int, Path, dict[str, Any]]]] = {name: [] for name in keys}
    # The files of all packs: after a change of `max_jobs` or of the grid, another pack may have saved a job.
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        for name, about in _jobs_in(path).items():
            if name not in keys:
                continue
            if about["key"] != keys[name]:
                raise CheckpointError(
                    f"{path}: {name} was saved for other settings or another parent; use another run_dir, or delete "
                    "this file to begin its jobs again"
                )
            offers[name].append((about["values"]["step"], path, about))
    newest = {}
    for name, offered in offers.items():
        # The furthest state first; if it is damaged, the next one is tried.
        for _, path, about in sorted(offered, key=lambda offer: -offer[0]):
            tensors = _read(path, name)
            if tensors is not None and digest(tensors) == about["sha256"]:
                newest[name] = (tensors, dict(about["values"]))
                break
            set_aside(path, f"the state of {name} is not what was written")
    if len(newest) < len(keys):
        _refuse_to_start_over(folder, pack, [name for name in keys if name not in newest])
    return newest


def _refuse_to_start_over(folder: Path, pack: str, jobs: list[str]) -> None:
    """`DamagedStateError` if a damaged file, also one set aside earlier, held the state of one of these jobs."""
    files = []
    for path in folder.glob(f"*{SUFFIX}{DAMAGED}"):
        held = _jobs_of_damaged(path)
        if held & set(jobs) if held is not None else path.name.rpartition(SUFFIX)[0][:-2] == pack:
            files.append(path)
    if not files:
        return
    newest = max(files, key=_age).name
    others = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    raise DamagedStateError(
        f"all saved states of {jobs[0]}{others} in {folder} are damaged ({newest} is the newest of {len(files)}); copy "
        f"one back without {DAMAGED}, start again in another run directory, or remove "
        f"{' and '.join(sorted(path.name for path in files))} to start over here at step 0"
    )


def _jobs_of_damaged(path: Path) -> set[str] | None:
    """The jobs that a damaged file names; a truncated file still has its header. None: the header is unreadable."""
    try:
        with open_regular(path) as file:
            head = json.loads(file.read(min(MAX_JSON_BYTES, int.from_bytes(file.read(8), "little"))))
        return set(json.loads(head["__metadata__"]["jobs"]))
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 of named tensors."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(name.encode() + b"\0" + tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def set_aside(path: Path, why: str) -> None:
    """Rename a damaged file and log a warning."""
    with contextlib.suppress(FileNotFoundError):  # another pack has just renamed it
        os.replace(path, path.with_name(path.name + DAMAGED))
        log.warning("%s is damaged (%s); set aside as %s%s", path.name, why, path.name, DAMAGED)


class SavedJob(Record):
    """The JSON values of one job in a pack's state."""

    key: str
    """Hash of the settings and the parent that it belongs to."""
    sha256: str
    """Of its tensors."""
    values: SavedValues
    """Of the loop: the step, sums of an unfinished row, randomness."""


class SavedValues(Record):
    """Numbers of a job's loop."""

    step: int = Field(ge=0)
    """Updates that were made."""


REMEDY = "the job begins again"


def _jobs_in(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        values = parse_json(metadata["jobs"], path, CheckpointError, REMEDY)
        jobs = as_record(dict[str, SavedJob], values, path, CheckpointError, REMEDY)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, SafetensorError, CheckpointError) as error:
        set_aside(path, " ".join(str(error).split()))
        return {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!r}, and this one reads {FORMAT}; finish it with the version "
            "that wrote it, or delete it to begin its jobs again"
        )
    return {name: job.model_dump() for name, job in jobs.items()}


def _read(path: Path, name: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            # Only this job's tensors are read from the mapped file; a pack of hundreds of jobs may be gigabytes.
            parts = [key for key in file.keys() if key.rpartition("/")[0] == name]  # noqa: SIM118 - not a dict
            return {key.rpartition("/")[2]: file.get_tensor(key) for key in parts}
    except (OSError, SafetensorError):
        return None
