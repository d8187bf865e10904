"""Learngenes and models on disk: `tensors.safetensors` and `manifest.json` with the sha256 of what it describes.

Nothing is unpickled. A folder is written under a temporary name and renamed, so that a half-written one never has its
final name; the manifest's hash says which learngene a descendant came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fine_dist.errors import ArtifactError
from fine_dist.model.zoo import Arch

FORMAT = 1
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """What a folder holds. `hash` is the sha256 of its tensor file."""

    folder: Path
    kind: str
    method: dict[str, Any]
    arch: Arch
    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    hash: str


def save_artifact(
    folder: str | Path,
    *,
    kind: str,
    method: dict[str, Any],
    arch: Arch,
    tensors: dict[str, Tensor],
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a folder atomically and return its manifest.

    kind:    `learngene`, `model` (a dense DiT) or `sigma` (scalers that name their learngene's hash).
    method:  the method's config as a mapping, with its `name`.
    tensors: by state-dict name; written as they are, on the CPU.
    extra:   anything else worth keeping (ancestor, licence, losses); JSON.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "method": method,
            "arch": arch.model_dump(),
            "sha256": {TENSORS: sha256(temporary / TENSORS)},
            "bytes": (temporary / TENSORS).stat().st_size,
            "num_numbers": sum(t.numel() for t in tensors.values()),
            "extra": extra or {},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (temporary / TENSORS, temporary / MANIFEST):
            _sync(path)
        if folder.exists():
            stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.rename(folder, stale)
            os.rename(temporary, folder)
            shutil.rmtree(stale)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest alone, without reading tensors. `ArtifactError` when it is missing or not ours."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {MANIFEST}: not a learngene or model, or one that was never finished")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format {manifest.get('format')!r} is not the {FORMAT} that this version reads")
    return manifest


def load_artifact(folder: str | Path, expect_kind: str | None = None) -> Artifact:
    """Read a folder and check it against its own manifest (sha256). `ArtifactError` says what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder, manifest = Path(folder), read_manifest(folder)
    if expect_kind and manifest["kind"] != expect_kind:
        raise ArtifactError(f"{folder} is a {manifest['kind']}, and a {expect_kind} is needed here")
    path = folder / TENSORS
    if not path.is_file():
        raise ArtifactError(f"{folder} has a manifest but no {TENSORS}: copy it whole, or make it again")
    found, stated = sha256(path), manifest["sha256"][TENSORS]
    if found != stated:
        raise ArtifactError(
            f"{path} is not what its manifest says (sha256 {found[:12]}..., stated {stated[:12]}...): "
            "it was edited or half copied; copy it again, or condense again"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    arch = Arch.model_validate(manifest["arch"])
    return Artifact(folder, manifest["kind"], manifest["method"], arch, tensors, manifest["extra"], found)


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
