"""A target on disk: its scalers, and the name of the learngene that they scale. Merged into a dense DiT when wanted.

A sigma artifact holds only what stage 2 trained. The rest comes back by descending once more from the learngene, whose
hash it names: a family of targets takes megabytes, not a model each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.errors import ArtifactError
from fine_dist.methods.base import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fine_dist.model.artifact import Artifact
    from fine_dist.model.dit import DiT
    from fine_dist.model.zoo import Arch


def descend(
    method: Method[Any], learngene: Artifact | None, target: Arch, seed: int, *, new_labels: bool = False
) -> DiT:
    """The target before stage 2, as (method, learngene, target, seed) decide it.

    new_labels: the target has classes of its own. Its label embedder starts at the learngene's null label, plus a small
    draw that tells classes apart, and trains beside sigma.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    if not new_labels or learngene is None:
        return method.descend(learngene, target, generator)
    same = target.model_copy(update={"num_classes": learngene.arch.num_classes})
    model = method.descend(learngene, same, generator)
    null = model.label.weight.detach()[-1]
    label = nn.Embedding(target.num_classes + 1, target.hidden_size)
    with torch.no_grad():
        label.weight.normal_(std=0.02, generator=generator).add_(null)
        label.weight[-1] = null
    model.label, model.arch = label, target
    return model


def save_descendant(
    folder: str | Path,
    *,
    method: dict[str, Any],
    learngene: Artifact,
    arch: Arch,
    seed: int,
    new_labels: bool,
    tensors: dict[str, Tensor],
    init: dict[str, Any],
) -> dict[str, Any]:
    """Write what stage 2 trained as an artifact of kind `sigma`; its manifest.

    init: what is worth keeping of stage 2 (losses, steps, learning rate, start, seconds); JSON.
    """
    from fine_dist.model.artifact import save_artifact

    here = Path(folder).absolute()
    extra = {
        "learngene": {
            "hash": learngene.hash,
            "path": str(learngene.folder.absolute()),
            "from_here": os.path.relpath(learngene.folder.absolute(), here),
        },
        "seed": seed,
        "new_labels": new_labels,
        "init": init,
    }
    return save_artifact(folder, kind="sigma", method=method, arch=arch, tensors=tensors, extra=extra)


def load_descendant(path: str | Path, learngene: str | Path | None = None) -> tuple[DiT, Artifact]:
    """A target as a dense DiT, merged now, and the artifact it came from.

    path:      a `sigma` artifact, or the folder of the task that wrote it.
    learngene: where the learngene lies now; none: where it lay, relative to the target or absolutely.

    `ArtifactError` when either is damaged, or the learngene is not the one that the scalers belong to.
    """
    from fine_dist.methods import from_manifest
    from fine_dist.model.artifact import MANIFEST, load_artifact
    from fine_dist.model.dit import DiT

    folder = Path(path)
    if not (folder / MANIFEST).is_file() and (folder / "sigma" / MANIFEST).is_file():
        folder = folder / "sigma"
    artifact = load_artifact(folder, "sigma")
    gene = _learngene_of(artifact, learngene)
    method = from_manifest(artifact.method)
    model = descend(method, gene, artifact.arch, artifact.extra["seed"], new_labels=artifact.extra["new_labels"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained != artifact.tensors.keys():
        odd = ", ".join(sorted(trained ^ artifact.tensors.keys())[:3])
        raise ArtifactError(f"{folder} does not hold what a {artifact.method['name']} target trains ({odd}, ...)")
    model.load_state_dict(artifact.tensors, strict=False)
    dense = DiT(artifact.arch)
    dense.load_state_dict(method.merge(model))
    return dense, artifact


def _learngene_of(artifact: Artifact, given: str | Path | None) -> Artifact:
    from fine_dist.model.artifact import MANIFEST, load_artifact

    named = artifact.extra["learngene"]
    places = [Path(given)] if given else [artifact.folder / named["from_here"], Path(named["path"])]
    place = next((place for place in places if (place / MANIFEST).is_file()), None)
    if place is None:
        raise ArtifactError(
            f"{artifact.folder} needs its learngene (hash {named['hash'][:12]}...), which is not in "
            + " or ".join(str(p) for p in places)
            + "; say where it lies now"
        )
    learngene = load_artifact(place, "learngene")
    if learngene.hash != named["hash"]:
        raise ArtifactError(
            f"{artifact.folder} was made from the learngene {named['hash'][:12]}..., and {place} is another one "
            f"({learngene.hash[:12]}...): sigma means nothing without its own factors"
        )
    return learngene


def trains(model: torch.nn.Module) -> bool:
    """Whether stage 2 has something to do: some of the model trains and some of it is frozen."""
    flags = {parameter.requires_grad for parameter in model.parameters()}
    return flags == {True, False}
