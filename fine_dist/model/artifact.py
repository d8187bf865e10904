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

from fine_dist.config import shown, validate
from fine_dist.errors import ArtifactError, ConfigError
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
            "sha256": {TENSORS: sha256(temporary / TENSORS), "settings": _settings_hash(kind, method, arch)},
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
    """The manifest alone, without reading tensors. `ArtifactError` when it is missing, not ours, or was altered."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {MANIFEST}: not a learngene or model, or one that was never finished")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {str(error)[:200]}; copy the folder again, or make it again") from None
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path}: a JSON object is needed, not {shown(manifest)}; it is not ours, or damaged")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: format {shown(manifest.get('format'))} is not the {FORMAT} that this version reads"
        )
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            found = f"is {shown(manifest[key])}" if key in manifest else "is not there"
            raise ArtifactError(f"{path}: {key} {found}, and a {kind.__name__} is needed: the file is damaged")
    if not isinstance(manifest["sha256"].get(TENSORS), str):
        raise ArtifactError(f"{path}: there is no sha256 of {TENSORS}: the file is damaged; copy the folder again")
    try:
        arch = validate(Arch, manifest["arch"], f"{path}: arch")
    except ConfigError as error:
        raise ArtifactError(str(error)) from None
    stated = manifest["sha256"].get("settings")
    if stated is not None and stated != _settings_hash(manifest["kind"], manifest["method"], arch):
        raise ArtifactError(
            f"{path}: kind, method or arch is not what was written (their sha256 differs): it was edited; "
            "copy the folder again, or make it again"
        )
    return manifest


_KEYS = {"kind": str, "method": dict, "arch": dict, "sha256": dict, "extra": dict}


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
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    arch = Arch.model_validate(manifest["arch"])
    for name, shape in arch.shell_shapes().items():
        if name in tensors and manifest["kind"] != "sigma" and tuple(tensors[name].shape) != shape:
            raise ArtifactError(
                f"{folder}: {name} is {list(tensors[name].shape)}, and {list(shape)} by the arch in its {MANIFEST}: "
                "one of them was altered; copy the folder again, or make it again"
            )
    return Artifact(folder, manifest["kind"], manifest["method"], arch, tensors, manifest["extra"], found)


def _settings_hash(kind: str, method: dict[str, Any], arch: Arch) -> str:
    """sha256 of what says how tensors are to be read: without it an altered number of heads would go unseen."""
    text = json.dumps([kind, method, arch.model_dump()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
