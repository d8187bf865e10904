"""Learngenes and models on disk: `tensors.safetensors` and `manifest.json` with the sha256 of what it describes.

No code in a file is run. A folder is written under a temporary name and renamed, so that a half-written one never has
its final name; the manifest's hash says which learngene a descendant came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fine_dist.core.config import shown, validate
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.files import sha256_of, sha256_text, whole_folder, written_whole
from fine_dist.core.json_files import read_json
from fine_dist.model.arch import Arch

FORMAT = 1
TENSORS, RAW, MANIFEST = "tensors.safetensors", "raw.safetensors", "manifest.json"
Weights = Literal["ema", "raw"]


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
    tensors: Mapping[str, Tensor],
    raw: Mapping[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a folder atomically and return its manifest.

    Args:
        kind: `learngene`, `model` (a dense DiT) or `target` (what is not its parent's, and the parent's hash).
        method: The method's config as a mapping, with its `name`.
        tensors: By state-dict name; written as they are, on the CPU. Of what was trained with an average: the
            average.
        raw: The weights themselves of what was trained, where `tensors` has their average.
        extra: Anything else worth keeping (ancestor, licence, losses); JSON.
    """

    with whole_folder(folder) as draft:
        written = {TENSORS: _write(draft / TENSORS, tensors)}
        if raw:
            written[RAW] = _write(draft / RAW, raw)
        shape = arch.model_dump()
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "method": method,
            "arch": shape,
            "sha256": {**written, "settings": _settings_hash(kind, method, shape)},
            "bytes": (draft / TENSORS).stat().st_size,
            "num_numbers": sum(t.numel() for t in tensors.values()),
            "extra": extra or {},
        }
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors; the file's sha256."""
    from safetensors.torch import save_file

    with written_whole(path):
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    return sha256_of(path)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest alone, without reading tensors. `ArtifactError` when it is missing, not ours, or was altered."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {MANIFEST}: not a learngene or model, or one that was never finished")
    manifest = read_json(path, ArtifactError, "copy the folder again, or make it again")
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
    if not isinstance(manifest["sha256"].get(TENSORS), str) or not all(map(_is_text, manifest["sha256"].values())):
        raise ArtifactError(f"{path}: there is no sha256 of {TENSORS}: the file is damaged; copy the folder again")
    try:
        validate(Arch, manifest["arch"], f"{path}: arch")
    except ConfigError as error:
        raise ArtifactError(str(error)) from None
    stated = manifest["sha256"].get("settings")
    if stated is not None and stated != _settings_hash(manifest["kind"], manifest["method"], manifest["arch"]):
        raise ArtifactError(
            f"{path}: kind, method or arch is not what was written (their sha256 differs): it was edited; "
            "copy the folder again, or make it again"
        )
    return manifest


_KEYS = {"kind": str, "method": dict, "arch": dict, "sha256": dict, "extra": dict, "bytes": int}


def load_artifact(folder: str | Path, expect_kind: str | None = None, weights: Weights = "ema") -> Artifact:
    """Read a folder and check it against its own manifest (sha256). `ArtifactError` says what is wrong with it.

    Args:
        weights: `raw` puts the trained weights themselves in the place of their averages; its hash is then of both
            files.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    if expect_kind and manifest["kind"] != expect_kind:
        raise ArtifactError(f"{folder} is a {manifest['kind']}, and a {expect_kind} is needed here")
    tensors, found = _read(folder / TENSORS, manifest["sha256"][TENSORS])
    if weights == "raw":
        if RAW not in manifest["sha256"]:
            raise ArtifactError(f"{folder} holds one set of weights, no average beside them; leave weights at ema")
        own, digest = _read(folder / RAW, manifest["sha256"][RAW])
        tensors, found = {**tensors, **own}, sha256_text(found + digest)
    arch = Arch.model_validate(manifest["arch"])
    for name, shape in arch.shell_shapes().items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ArtifactError(
                f"{folder}: {name} is {list(tensors[name].shape)}, and {list(shape)} by the arch in its {MANIFEST}: "
                "one of them was altered; copy the folder again, or make it again"
            )
    return Artifact(folder, manifest["kind"], manifest["method"], arch, tensors, manifest["extra"], found)


def _read(path: Path, stated: str) -> tuple[dict[str, Tensor], str]:
    """A tensor file and its sha256, which must be as stated."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtifactError(f"{path.parent} has a manifest but no {path.name}: copy it whole, or make it again")
    found = sha256_of(path)
    if found != stated:
        raise ArtifactError(
            f"{path} is not what its manifest says (sha256 {found[:12]}..., stated {str(stated)[:12]}...): "
            "it was edited or half copied; copy it again, or condense again"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ArtifactError(
                f"{path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, and weights are floating-point "
                "numbers: it was altered; copy the folder again, or make it again"
            )
    return tensors, found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _settings_hash(kind: str, method: dict[str, Any], arch: dict[str, Any]) -> str:
    """sha256 of what says how tensors are to be read, as it is written: without it an altered number of heads would go
    unseen. Of the written words, not of what they mean today: a later version knows more settings."""
    text = json.dumps([kind, method, arch], sort_keys=True)
    return sha256_text(text)
