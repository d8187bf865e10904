"""Models from disk: whatever a stage or another project wrote, as something that answers `(z, t, y)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.artifacts.locate import (
    NO_HINTS,
    HintsConfig,
    facts_of,
    find_artifact,
    hash_of,
    inherited_facts,
    is_foreign,
    read_artifact,
)
from fine_dist.artifacts.targets import load_target, load_target_module, merged
from fine_dist.core.errors import ArtifactError
from fine_dist.methods import from_manifest, parent_of

if TYPE_CHECKING:
    from torch import nn

    from fine_dist.methods.base import Method
    from fine_dist.model.artifact import Weights
    from fine_dist.model.dit import DiT

__all__ = ["facts_of", "find_artifact", "hash_of", "inherited_facts", "load_model", "load_unmerged", "read_artifact"]


def load_model(
    path: str | Path,
    learngene: str | Path | None = None,
    weights: Weights = "ema",
    hints: HintsConfig = NO_HINTS,
    *,
    draws: bool = True,
) -> tuple[DiT, dict[str, Any]]:
    """A dense DiT from any source: a model, an initialised target (merged), a learngene (merged), a run's directory;
    DiT's `.pt`, a folder of diffusers or a name on the hub.

    learngene: where a target's parent lies now, when it has moved; checked by its hash.
    weights:   the averages of what was trained, or the weights themselves (a target has one set, the latter).
    hints:     what another project's file does not say.
    draws:     it is to be sampled, measured or imitated; `ArtifactError` for one that does not predict noise.

    Returns it with what is worth saying about it: kind, method, hash, folder, and the stage's own extras. Where a
    method's product is no plain DiT, that product is given as it is.
    """
    model: Any
    if not is_foreign(path) and facts_of(path).kind in ("target", "sigma"):
        model, artifact = load_target(find_artifact(path), learngene)
    else:
        artifact = read_artifact(path, hints, weights)
        parent = parent_of(artifact)
        model = merged(from_manifest(artifact.method), parent.module) if artifact.kind == "learngene" else parent.module
    if draws and artifact.extra.get("imported", {}).get("prediction", "noise") != "noise":
        raise ArtifactError(
            f"{path} predicts velocities at times 0..1 (SiT), and noise at timesteps is needed here: it can be trained "
            "on (train --parent), not sampled, measured or imitated"
        )
    about = {"kind": artifact.kind, "method": artifact.method, "hash": artifact.hash, "folder": str(artifact.folder)}
    return model, {**about, **artifact.extra}


def load_unmerged(path: str | Path, learngene: str | Path | None = None) -> tuple[Method[Any], nn.Module]:
    """A learngene or target as its own method's module, and that method; of a dense model, the model."""
    if not is_foreign(path) and facts_of(path).kind in ("target", "sigma"):
        return load_target_module(find_artifact(path), learngene)[:2]
    parent = parent_of(read_artifact(path))
    return from_manifest(parent.artifact.method), parent.module
