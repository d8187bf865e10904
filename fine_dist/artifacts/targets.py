"""Targets of stage 2: made from a parent, saved as their difference to it, and loaded as dense models.

A target's artifact holds every tensor that differs from its parent's, trained or not, and refers to the rest by the
parent's hash. A family of targets takes megabytes instead of a model each, and loading computes nothing anew, so that a
later version of a method reads it as it was written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.artifacts.locate import ARTIFACT_FOLDERS, is_foreign
from fine_dist.artifacts.reading import inherited_facts, read_artifact
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.errors import ArtifactError
from fine_dist.methods import check, from_manifest, loaded, parent_of
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import MANIFEST, Artifact, ArtifactManifest, load_artifact, save_artifact
from fine_dist.model.dit import DiT, labels_from_null


def descend(
    method: Method[MethodConfig], parent: Parent | None, target: Arch, seed: int, *, new_labels: bool = False
) -> Descent:
    """The target before stage 2; a function of its arguments alone.

    Args:
        method: The method that makes it.
        parent: What it is made from; None for a method that needs none.
        target: Its shape.
        seed: Seeds whatever is random in it.
        new_labels: The target has classes of its own. Its label embedder starts at the parent's null label plus a
            small random vector a class, and trains with whatever else does.

    Raises:
        ArtifactError: The method makes no such target of this parent.
    """
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
    method: Method[MethodConfig], parent: Parent | None, target: Arch, *, new_labels: bool = False
) -> tuple[Parent | None, Arch]:
    """Check a target without building it: the parent the method uses, and the shape it is asked for.

    The shape is the target's, with the parent's classes where the target's own labels are added afterwards.
    `ArtifactError` when the method makes no such target.
    """
    if method.traits.parents == ("none",):
        parent = None  # it may have given the shape, and gives nothing else
    if new_labels and parent is not None and "classes" not in method.traits.varies:
        target = target.model_copy(update={"num_classes": parent.arch.num_classes})
    check(method, parent.artifact if parent else None, target)
    return parent, target


def changed_tensors(model: nn.Module, parent: Parent | None) -> dict[str, Tensor]:
    """Tensors of a target that are not, bit for bit, its parent's of the same name (copies, on the CPU)."""
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
    tensors: Mapping[str, Tensor],
    names: list[str],
    facts: Mapping[str, Any],
) -> ArtifactManifest:
    """Write a target as an artifact of kind `target`, and return its manifest.

    Args:
        folder: Where it is written.
        method: Settings of the method.
        parent: What it was made from.
        arch: Its shape.
        tensors: Its tensors that are not the parent's.
        names: Names of all its tensors.
        facts: How it was made (seed, losses, steps, learning rate, seconds); JSON.
    """
    extra: dict[str, Any] = {"inherited": sorted(set(names) - tensors.keys())}
    if parent is not None:
        parent_folder = parent.artifact.folder.absolute()
        extra |= _inherited_by(parent, arch)
        extra["parent"] = {
            "hash": parent.artifact.hash,
            "path": str(parent_folder),
            "from_here": os.path.relpath(parent_folder, Path(folder).absolute()),
        }
        if imported := parent.artifact.extra.get("imported"):
            extra["parent"] |= {"source": imported["source"], "hints": imported["hints"]}
    extra |= facts
    return save_artifact(folder, kind="target", method=dict(method), arch=arch, tensors=dict(tensors), extra=extra)


def _inherited_by(parent: Parent, arch: Arch) -> dict[str, Any]:
    """Facts a target inherits from its parent; class names only where its classes are the parent's."""
    facts = inherited_facts(parent.artifact.extra)
    if arch.num_classes != parent.arch.num_classes:
        facts.pop("class_names", None)
    return facts


def load_target(path: str | Path, learngene: str | Path | None = None) -> tuple[DiT, Artifact]:
    """A target merged into a dense DiT, and the artifact it came from.

    Args:
        path: The artifact, or the folder of the task that wrote it.
        learngene: Where its parent lies now. Default: where it lay, relative to the target or absolutely.

    Raises:
        ArtifactError: Either is damaged, or the parent is another one than the target's.
    """
    method, model, artifact = load_target_module(path, learngene)
    return merged(method, model), artifact


def load_target_module(
    path: str | Path, learngene: str | Path | None = None
) -> tuple[Method[MethodConfig], nn.Module, Artifact]:
    """A target as its own method's module, with that method and the artifact; as `load_target`."""
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        folder = next((folder / name for name in ARTIFACT_FOLDERS if (folder / name / MANIFEST).is_file()), folder)
    artifact = load_artifact(folder)
    if artifact.kind != "target":
        raise ArtifactError(f"{folder} is a {artifact.kind}, and a target is needed here")
    method = from_manifest(artifact.method)
    parent = _parent(artifact, learngene)
    return method, _assembled(artifact, parent), artifact


def merged(method: Method[MethodConfig], model: nn.Module) -> DiT:
    """The ordinary dense DiT of the same function; of a method whose product is none, the product itself."""
    if not method.traits.dense:
        return model  # type: ignore[return-value]
    dense = DiT(model.arch)  # type: ignore[arg-type]
    dense.load_state_dict(method.merge(model))
    return dense


def _assembled(artifact: Artifact, parent: Parent | None) -> nn.Module:
    theirs = parent.artifact.tensors if parent else {}
    inherited = artifact.extra.get("inherited")
    if not isinstance(inherited, list) or not all(isinstance(name, str) for name in inherited):
        raise ArtifactError(f"{artifact.folder}: inherited in its manifest.json is no list of names: it is damaged")
    absent = [name for name in inherited if name not in theirs]
    if absent:
        raise ArtifactError(f"{artifact.folder} takes {absent[0]} from its parent, which has no such tensor")
    state = {**{name: theirs[name] for name in inherited}, **artifact.tensors}
    return loaded(from_manifest(artifact.method), artifact.arch, state, artifact.folder)


def _parent(artifact: Artifact, learngene: str | Path | None) -> Parent | None:
    named = artifact.extra.get("parent")
    if named is None:
        return None
    if not (isinstance(named, dict) and all(isinstance(named.get(key), str) for key in ("hash", "path", "from_here"))):
        raise ArtifactError(f"{artifact.folder}: parent in its manifest.json is damaged; copy the folder again")
    candidates = [artifact.folder / named["from_here"], Path(named["path"])]
    if learngene:
        candidates = [Path(learngene), *(Path(learngene) / name for name in ARTIFACT_FOLDERS)]
    place = next((place for place in candidates if (place / MANIFEST).is_file()), None)
    if place is not None:
        parent = load_artifact(place)
    else:
        parent = _foreign_parent(artifact, named, candidates)
    if parent.hash != named["hash"]:
        raise ArtifactError(
            f"{artifact.folder} was made from the parent {named['hash'][:12]}..., and {parent.folder} is another one "
            f"({parent.hash[:12]}...); give the right one with --learngene FOLDER"
        )
    return parent_of(parent)


def _foreign_parent(artifact: Artifact, named: Mapping[str, Any], candidates: list[Path]) -> Artifact:
    """A parent that is another project's model: a file or folder where it lay or lies, or a name on the hub."""
    hints = HintsConfig(**named.get("hints", {}))
    sources = [place for place in candidates if place.exists() and is_foreign(place)]
    if not sources and "source" in named and is_foreign(named["source"]):
        sources = [named["source"]]
    if sources:
        return read_artifact(sources[0], hints)
    raise ArtifactError(
        f"{artifact.folder} needs its parent (hash {named['hash'][:12]}...), which is not in "
        + " or ".join(str(p) for p in candidates[:2])
        + "; say where it lies now with --learngene FOLDER"
    )
