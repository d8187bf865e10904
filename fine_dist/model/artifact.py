"""Learngenes and models on disk: `tensors.safetensors` and `manifest.json` with the sha256 of what it describes.

No code in a file is run. A folder is written under a temporary name and renamed, so that a half-written one never has
its final name; the manifest's hash says which learngene a descendant came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fine_dist.core.config import short_repr, validate
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.files import atomic_folder, library_write, sha256_of, sha256_text
from fine_dist.core.json_files import read_json
from fine_dist.model.arch import Arch

FORMAT = 1
TENSORS, RAW, MANIFEST = "tensors.safetensors", "raw.safetensors", "manifest.json"
Weights = Literal["ema", "raw"]


class ArtifactManifest(TypedDict):
    """`manifest.json` of an artifact."""

    format: int
    kind: str
    method: dict[str, Any]
    """Settings of the method, with its `name`."""
    arch: dict[str, Any]
    """Fields of the architecture."""
    sha256: dict[str, str]
    """Hash of each tensor file by name; under `settings` the hash of kind, method and arch together."""
    bytes: int
    """Size of `tensors.safetensors`."""
    num_numbers: int
    """Numbers in `tensors.safetensors`."""
    extra: dict[str, Any]
    """Further JSON values."""


@dataclass(frozen=True)
class Artifact:
    """The content of an artifact's folder. `hash` is the sha256 of its tensor file."""

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
) -> ArtifactManifest:
    """Write a folder atomically and return its manifest.

    Args:
        folder: Folder to write; an existing one is replaced.
        kind: `learngene`, `model` (a dense DiT) or `target` (the tensors that are not its parent's).
        method: The method's config as a mapping, with its `name`.
        arch: Architecture.
        tensors: Tensors by state-dict name, written in their dtype: the averages (EMA) if weights were averaged.
        raw: The weights of the last step, if `tensors` holds their averages.
        extra: Further JSON values (ancestor, license, losses).
    """
    with atomic_folder(folder) as draft:
        written = {TENSORS: _write(draft / TENSORS, tensors)}
        if raw:
            written[RAW] = _write(draft / RAW, raw)
        shape = arch.model_dump()
        manifest: ArtifactManifest = {
            "format": FORMAT,
            "kind": kind,
            "method": method,
            "arch": shape,
            "sha256": {**written, "settings": _settings_hash(kind, method, shape)},
            "bytes": (draft / TENSORS).stat().st_size,
            "num_numbers": sum(t.numel() for t in tensors.values()),
            "extra": extra or {},
        }
        # Written last, inside the draft: the manifest holds the hashes of the files before it.
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file; returns its sha256."""
    with library_write(path):
        # safetensors writes memory in its current layout, so views and transposed tensors are copied first.
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    return sha256_of(path)


def read_manifest(folder: str | Path) -> ArtifactManifest:
    """Read the manifest without the tensors. `ArtifactError` when it is missing, of another format, or edited."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is not a learngene or model, or writing it never finished")
    manifest = read_json(path, ArtifactError, "copy the folder again, or make it again")
    if not isinstance(manifest, dict):
        raise ArtifactError(
            f"{path}: a JSON object is needed, not {short_repr(manifest)}; the file is damaged or another program's"
        )
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: format {short_repr(manifest.get('format'))} is not the {FORMAT} that this version reads"
        )
    for key, kind in _KEYS.items():
        if not isinstance(manifest.get(key), kind):
            problem = f"is {short_repr(manifest[key])}" if key in manifest else "is missing"
            raise ArtifactError(f"{path}: {key} {problem}, and a {kind.__name__} is needed: the file is damaged")
    if not isinstance(manifest["sha256"].get(TENSORS), str) or not all(map(_is_text, manifest["sha256"].values())):
        raise ArtifactError(f"{path}: there is no sha256 of {TENSORS}: the file is damaged; copy the folder again")
    try:
        validate(Arch, manifest["arch"], f"{path}: arch")
    except ConfigError as error:
        raise ArtifactError(str(error)) from None
    stated = manifest["sha256"].get("settings")
    if stated is not None and stated != _settings_hash(manifest["kind"], manifest["method"], manifest["arch"]):
        raise ArtifactError(
            f"{path}: kind, method or arch was edited after writing (their sha256 differs); copy the folder again, or "
            "make it again"
        )
    return cast(ArtifactManifest, manifest)


_KEYS = {"kind": str, "method": dict, "arch": dict, "sha256": dict, "extra": dict, "bytes": int}


def load_artifact(folder: str | Path, expect_kind: str | None = None, weights: Weights = "ema") -> Artifact:
    """Read an artifact and verify it against its manifest (sha256).

    Args:
        folder: The artifact's folder.
        expect_kind: Kind that it must have. None: any.
        weights: `ema` reads the averages; `raw` reads the weights of the last step, and `hash` then covers both files.

    Raises:
        ArtifactError: The folder is missing, damaged, edited, or of another kind.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    if expect_kind and manifest["kind"] != expect_kind:
        raise ArtifactError(f"{folder} is a {manifest['kind']}, and a {expect_kind} is needed here")
    tensors, digest = _read(folder / TENSORS, manifest["sha256"][TENSORS])
    if weights == "raw":
        if RAW not in manifest["sha256"]:
            raise ArtifactError(f"{folder} has no raw weights: they were not averaged; leave weights at ema")
        raw, raw_digest = _read(folder / RAW, manifest["sha256"][RAW])
        tensors, digest = {**tensors, **raw}, sha256_text(digest + raw_digest)
    arch = Arch.model_validate(manifest["arch"])
    for name, shape in arch.shell_shapes().items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ArtifactError(
                f"{folder}: {name} is {list(tensors[name].shape)}, and {list(shape)} by the arch in its {MANIFEST}: "
                "one of them was altered; copy the folder again, or make it again"
            )
    return Artifact(folder, manifest["kind"], manifest["method"], arch, tensors, manifest["extra"], digest)


def _read(path: Path, stated: str) -> tuple[dict[str, Tensor], str]:
    """Read a tensor file whose sha256 must be `stated`; returns the tensors and the hash."""
    if not path.is_file():
        raise ArtifactError(
            f"{path.parent} has a manifest but no {path.name}: copy the complete folder, or make it again"
        )
    # The hash is checked before parsing, so that a damaged file is reported as such and never reaches the parser.
    digest = sha256_of(path)
    if digest != stated:
        raise ArtifactError(
            f"{path} is not what its manifest says (sha256 {digest[:12]}..., stated {str(stated)[:12]}...): "
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
        if not tensor.numel() or not tensor.float().isfinite().all():
            what = "entries that are not finite" if tensor.numel() else "no entries"
            raise ArtifactError(
                f"{path}: {name} has {what}: its training diverged, or it was altered; copy the folder again, or make "
                "it again"
            )
        if tensor.dtype.itemsize == 1:  # 8-bit floats are a storage format; torch has little arithmetic for them
            tensors[name] = tensor.float()
    return tensors, digest


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _settings_hash(kind: str, method: dict[str, Any], arch: dict[str, Any]) -> str:
    """sha256 of the settings that decide how tensors are read: an edited number of heads would change no shape.

    The JSON as written is hashed and not the parsed config, because a later version may have more settings.
    """
    return sha256_text(json.dumps([kind, method, arch], sort_keys=True))
