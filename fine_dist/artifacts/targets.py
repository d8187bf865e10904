"""Targets: made from a parent, written down whole, and read again whatever the code has become meanwhile.

A target's artifact holds every tensor that is not its parent's own, trained or not, and names the rest by the parent's
hash: a family of targets takes megabytes, not a model each, and nothing of it is computed again when it is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.artifacts.locate import ARTIFACT_FOLDERS, HintsConfig, inherited_facts, is_foreign, read_artifact
from fine_dist.core.errors import ArtifactError
from fine_dist.methods import check, from_manifest, parent_of
from fine_dist.methods.base import Descent, Method, Parent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fine_dist.model.arch import Arch
    from fine_dist.model.artifact import Artifact
    from fine_dist.model.dit import DiT


def descend(
    method: Method[Any], parent: Parent | None, target: Arch, seed: int, *, new_labels: bool = False
) -> Descent:
    """The target before stage 2, as (method, parent, target, seed) decide it. `ArtifactError` when it cannot be.

    new_labels: the target has classes of its own. Its label embedder starts at the parent's null label, plus a small
    draw that tells classes apart, and trains beside whatever else does.
    """
    import torch

    from fine_dist.model.dit import DiT, labels_from_null

    generator = torch.Generator().manual_seed(seed)
    parent, same = check_target(method, parent, target, new_labels=new_labels)
    descent = method.descend(parent, same, generator)
    if new_labels and parent is not None:
        model: Any
        descent.model.arch = target  # type: ignore[assignment]
        for model in [m for m in descent.model.modules() if isinstance(m, DiT)]:  # one, or several of a pool
            model.arch = model.arch.model_copy(update={"num_classes": target.num_classes})
            model.label = labels_from_null(model.label.weight.detach()[-1], target.num_classes, generator)
    return descent


def check_target(
    method: Method[Any], parent: Parent | None, target: Arch, *, new_labels: bool = False
) -> tuple[Parent | None, Arch]:
    """`ArtifactError` when the method makes no such target. What it takes of the parent, and the shape it is asked for:
    the target's, with the parent's classes where labels of its own come afterwards. Builds nothing."""
    if method.traits.parents == ("none",):
        parent = None  # it may have given the shape; nothing else of it is taken
    if new_labels and parent is not None and "classes" not in method.traits.varies:
        target = target.model_copy(update={"num_classes": parent.arch.num_classes})
    check(method, parent.artifact if parent else None, target)
    return parent, target


def own_tensors(model: nn.Module, parent: Parent | None) -> dict[str, Tensor]:
    """What of a target is not, bit for bit, its parent's tensor of the same name (copies, on the CPU)."""
    import torch

    theirs = parent.artifact.tensors if parent else {}
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if not (name in theirs and torch.equal(theirs[name], tensor.detach().cpu()))
    }


def save_target(
    folder: str | Path,
    *,
    method: Mapping[str, Any],
    parent: Parent | None,
    arch: Arch,
    own: Mapping[str, Tensor],
    names: list[str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a target as an artifact of kind `target`; its manifest.

    own:   its tensors that are not the parent's. names: of all its tensors.
    facts: what is worth keeping of how it was made (seed, losses, steps, learning rate, seconds); JSON.
    """
    from fine_dist.model.artifact import save_artifact

    extra: dict[str, Any] = {"inherited": sorted(set(names) - own.keys())}
    if parent is not None:
        place = parent.artifact.folder.absolute()
        extra |= _handed_on(parent, arch)
        extra["parent"] = {
            "hash": parent.artifact.hash,
            "path": str(place),
            "from_here": os.path.relpath(place, Path(folder).absolute()),
        }
        if imported := parent.artifact.extra.get("imported"):
            extra["parent"] |= {"source": imported["source"], "hints": imported["hints"]}
    extra |= facts
    return save_artifact(folder, kind="target", method=dict(method), arch=arch, tensors=dict(own), extra=extra)


def _handed_on(parent: Parent, arch: Arch) -> dict[str, Any]:
    """What a target's manifest has of its parent's; names of classes only where the classes are the parent's."""
    found = inherited_facts(parent.artifact.extra)
    if arch.num_classes != parent.arch.num_classes:
        found.pop("class_names", None)
    return found


def load_target(path: str | Path, learngene: str | Path | None = None) -> tuple[DiT, Artifact]:
    """A target as a dense DiT, merged now, and the artifact it came from.

    path:      the artifact, or the folder of the task that wrote it.
    learngene: where its parent lies now; none: where it lay, relative to the target or absolutely.

    `ArtifactError` when either is damaged, or the parent is not the one that the target belongs to.
    """
    method, model, artifact = load_target_module(path, learngene)
    return merged(method, model), artifact


def load_target_module(
    path: str | Path, learngene: str | Path | None = None
) -> tuple[Method[Any], nn.Module, Artifact]:
    """A target as its own method's module, with that method and the artifact; as `load_target`."""
    from fine_dist.model.artifact import MANIFEST, load_artifact

    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        folder = next((folder / name for name in ARTIFACT_FOLDERS if (folder / name / MANIFEST).is_file()), folder)
    artifact = load_artifact(folder)
    if artifact.kind not in ("target", "sigma"):
        raise ArtifactError(f"{folder} is a {artifact.kind}, and a target is needed here")
    method = from_manifest(artifact.method)
    parent = _parent(artifact, learngene)
    model = _as_it_was(artifact, parent) if artifact.kind == "target" else _made_again(artifact, method, parent)
    return method, model, artifact


def merged(method: Method[Any], model: nn.Module) -> DiT:
    """The ordinary dense DiT of the same function; of a method whose product is none, the product itself."""
    from fine_dist.model.dit import DiT

    if not method.traits.dense:
        return model  # type: ignore[return-value]
    dense = DiT(model.arch)  # type: ignore[arg-type]
    dense.load_state_dict(method.merge(model))
    return dense


def _as_it_was(artifact: Artifact, parent: Parent | None) -> nn.Module:
    theirs = parent.artifact.tensors if parent else {}
    absent = [name for name in artifact.extra["inherited"] if name not in theirs]
    if absent:
        raise ArtifactError(f"{artifact.folder} takes {absent[0]} from its parent, which has no such tensor")
    state = {**{name: theirs[name] for name in artifact.extra["inherited"]}, **artifact.tensors}
    model = from_manifest(artifact.method).module(artifact.arch, state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(f"{artifact.folder} does not hold a whole target: {' '.join(str(error).split())}") from None
    return model


def _made_again(artifact: Artifact, method: Method[Any], parent: Parent | None) -> nn.Module:
    """A target of an earlier version, which holds what was trained alone: the rest is made once more."""
    extra = artifact.extra
    model = descend(method, parent, artifact.arch, extra["seed"], new_labels=extra["new_labels"]).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained != artifact.tensors.keys():
        odd = ", ".join(sorted(trained ^ artifact.tensors.keys())[:3])
        raise ArtifactError(f"{artifact.folder} does not hold what its method trains ({odd}, ...)")
    model.load_state_dict(artifact.tensors, strict=False)
    return model


def _parent(artifact: Artifact, given: str | Path | None) -> Parent | None:
    from fine_dist.model.artifact import MANIFEST, load_artifact

    named = artifact.extra.get("parent") or artifact.extra.get("learngene")
    if named is None:
        return None
    places = [artifact.folder / named["from_here"], Path(named["path"])]
    if given:
        places = [Path(given), *(Path(given) / name for name in ARTIFACT_FOLDERS)]
    place = next((place for place in places if (place / MANIFEST).is_file()), None)
    if place is not None:
        parent = load_artifact(place)
    else:
        parent = _foreign_parent(artifact, named, places)
    if parent.hash != named["hash"]:
        raise ArtifactError(
            f"{artifact.folder} was made from the parent {named['hash'][:12]}..., and {parent.folder} is another one "
            f"({parent.hash[:12]}...): the target means nothing without its own"
        )
    return parent_of(parent)


def _foreign_parent(artifact: Artifact, named: Mapping[str, Any], places: list[Path]) -> Artifact:
    """A parent of another project's, where it lay or lies; a name on the hub is one, too."""
    hints = HintsConfig(**named.get("hints", {}))
    sources = [place for place in places if place.exists() and is_foreign(place)]
    if not sources and "source" in named and is_foreign(named["source"]):
        sources = [named["source"]]
    if sources:
        return read_artifact(sources[0], hints)
    raise ArtifactError(
        f"{artifact.folder} needs its parent (hash {named['hash'][:12]}...), which is not in "
        + " or ".join(str(p) for p in places[:2])
        + "; say where it lies now with --learngene FOLDER"
    )
