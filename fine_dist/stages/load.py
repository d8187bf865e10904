"""Models from disk: whatever a stage wrote, as something that answers `(z, t, y)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.config import expand_path
from fine_dist.errors import ArtifactError
from fine_dist.methods import from_manifest, parent_of
from fine_dist.stages.targets import PLACES, load_target, load_target_module, merged

if TYPE_CHECKING:
    from torch import nn

    from fine_dist.methods import Method
    from fine_dist.model.artifact import Weights
    from fine_dist.model.dit import DiT


def load_model(
    path: str | Path, learngene: str | Path | None = None, weights: Weights = "ema"
) -> tuple[DiT, dict[str, Any]]:
    """A dense DiT from a folder: a model, an initialised target (merged), a learngene (merged), or a run's directory.

    learngene: where a target's parent lies now, when it has moved; checked by its hash.
    weights:   the averages of what was trained, or the weights themselves (a target has one set, the latter).

    Returns it with what is worth saying about it: kind, method, hash, folder, and the stage's own extras. Where a
    method's product is no plain DiT, that product is given as it is.
    """
    from fine_dist.model.artifact import load_artifact, read_manifest

    folder = find_artifact(path)
    if read_manifest(folder)["kind"] in ("target", "sigma"):
        model: Any
        model, artifact = load_target(folder, learngene)
    else:
        artifact = load_artifact(folder, weights=weights)
        parent = parent_of(artifact)
        model = merged(from_manifest(artifact.method), parent.module) if artifact.kind == "learngene" else parent.module
    about = {"kind": artifact.kind, "method": artifact.method, "hash": artifact.hash, "folder": str(folder)}
    return model, {**about, **artifact.extra}


def load_unmerged(path: str | Path, learngene: str | Path | None = None) -> tuple[Method[Any], nn.Module]:
    """A learngene or target as its own method's module, and that method; of a dense model, the model."""
    from fine_dist.model.artifact import load_artifact, read_manifest

    folder = find_artifact(path)
    if read_manifest(folder)["kind"] in ("target", "sigma"):
        return load_target_module(folder, learngene)[:2]
    parent = parent_of(load_artifact(folder))
    return from_manifest(parent.artifact.method), parent.module


def hash_of(path: str | Path) -> str:
    """The hash of an artifact, as its manifest states it; its tensors are not read."""
    from fine_dist.model.artifact import TENSORS, read_manifest

    return str(read_manifest(find_artifact(path))["sha256"][TENSORS])


def find_artifact(path: str | Path) -> Path:
    """The artifact in a folder: itself, or the one that lies in a run's directory."""
    folder = Path(expand_path(str(path)))
    for place in (folder, *(folder / name for name in PLACES)):
        if (place / "manifest.json").is_file():
            return place
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist; give a folder that condense, init or train wrote")
    raise ArtifactError(
        f"{folder} holds no model, target or learngene: not a run's directory, or the run is not finished"
    )
