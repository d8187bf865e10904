"""Models from disk as modules `(z, t, y) -> output`, whatever wrote them."""

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
        path: A model, an initialized target (merged), a learngene (merged), a run directory; DiT's `.pt`, a diffusers
            folder, or a name on the hub.
        learngene: Where a target's parent lies now, when it has moved; checked by its hash.
        weights: The averaged weights or the trained ones. A target has one set, the latter.
        hints: What another project's file does not say.

    Returns:
        The model, and what is known of it: kind, method, hash, folder, and its manifest's extra. Where a method's
        product is no plain DiT, that product.

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
    """A learngene or target as its own method's module, and that method; of a dense model, the model."""
    if not is_foreign(path) and facts_of(path).kind == "target":
        return load_target_module(find_artifact(path), learngene)[:2]
    parent = parent_of(read_artifact(path))
    return from_manifest(parent.artifact.method), parent.module
