"""The state of a pack's jobs on disk: one safetensors file a pack, any job of which any other pack can go on with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fine_dist.errors import CheckpointError
from fine_dist.files import sync_folder

FORMAT = "1"
SUFFIX = ".state.safetensors"

JobState = tuple[str, dict[str, Tensor], dict[str, Any]]
"""(key, tensors, JSON values) of a job."""


def write_states(path: Path, states: dict[str, JobState]) -> None:
    """Write the states of a pack's jobs, by name, atomically. Values are JSON and have a `step`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}/{part}": x.contiguous() for name, (_, parts, _) in states.items() for part, x in parts.items()}
    about = {name: {"key": key, "values": values} for name, (key, _, values) in states.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "jobs": json.dumps(about)})
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_states(folder: Path, keys: dict[str, str]) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """The furthest state of every named job that any pack in `folder` has saved: (tensors, values).

    keys: wanted job -> its key. `CheckpointError` when a file is damaged, or a job of this name is another one.
    """
    best: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        for name, about in _about(path).items():
            if name not in keys:
                continue
            if about["key"] != keys[name]:
                raise CheckpointError(
                    f"{path}: {name} was saved for other settings or another learngene; use another run_dir, or delete "
                    "this file to start its jobs again"
                )
            if name not in best or about["values"]["step"] > best[name][1]["step"]:
                best[name] = (path, about["values"])
    found = {}
    for name, (path, values) in best.items():
        with safe_open(path, framework="pt") as file:
            parts = [key for key in file.keys() if key.rpartition("/")[0] == name]  # noqa: SIM118 - not a dict
            found[name] = ({key.rpartition("/")[2]: file.get_tensor(key) for key in parts}, values)
    return found


def _about(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r} is not {FORMAT}")
        about: dict[str, Any] = json.loads(metadata["jobs"])
        return about
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it to start its jobs again") from None
