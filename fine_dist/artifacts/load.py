"""Loads models of any file format as modules `(z, t, y) -> output`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fine_dist.artifacts.locate import find_artifact, is_foreign
from fine_dist.artifacts.reading import facts_of, read_artifact
from fine_dist.artifacts.settings import NO_HINTS, HintsConfig
from fine_dist.artifacts.targets import load_target, load_target_module, merged
from fine_dist.methods import from_manifest, parent_of
from fine_dist.methods.base import Method, MethodConfig
from fine_dist.model.artifact import Weights
from fine_dist.model.dit import DiT


def load_model(
    path: str | Path,
    learngene: str | Path | None = None,
    weights: Weights = "ema",
    hints: HintsConfig = NO_HINTS,
) -> tuple[DiT, dict[str, Any]]:
    """Load a dense DiT from any source.

    Args:
        path: Artifact (a model, a target or a learngene; the last two are merged), run directory, file in DiT's format,
            diffusers folder, or hub name.
        learngene: Current location of a target's parent, if it has moved. The parent's hash is checked.
        weights: The averaged weights (`ema`) or those of the last step (`raw`). A target has one set only.
        hints: Facts that another project's file does not state.

    Returns:
        The model and its metadata: kind, method, hash, folder, and the entries of `extra` in its manifest. If merging
        does not give a plain DiT (`Traits.dense` is false), the model is a module of its method.

    Raises:
        ArtifactError: The source cannot be read.
    """
    model: Any
    if not is_foreign(path) and facts_of(path).kind == "target":
        model, artifact = load_target(find_artifact(path), learngene)
    else:
        artifact = read_artifact(path, hints, weights)
        parent = parent_of(artifact)
        model = merged(from_manifest(artifact.method), parent.module) if artifact.kind == "learngene" else parent.module
    metadata = {"kind": artifact.kind, "method": artifact.method, "hash": artifact.hash, "folder": str(artifact.folder)}
    return model, {**metadata, **artifact.extra}


def load_unmerged(path: str | Path, learngene: str | Path | None = None) -> tuple[Method[MethodConfig], nn.Module]:
    """Load a learngene or target as a module of its method, without merging it; a dense model as `DiT`.

    Returns:
        The method and the module.

    Raises:
        ArtifactError: The source cannot be read.
    """
    if not is_foreign(path) and facts_of(path).kind == "target":
        return load_target_module(find_artifact(path), learngene)[:2]
    parent = parent_of(read_artifact(path))
    return from_manifest(parent.artifact.method), parent.module
