"""Targets of stage 2: initialized from a parent, saved as their difference from it, and loaded as dense models.

A target's artifact holds the tensors that differ from its parent's, trained or not; the manifest names the others and
the parent's hash. A family of targets therefore takes megabytes instead of one model per target. Loading does not
initialize anything again, so later versions of a method load a target unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fine_dist.artifacts.locate import ARTIFACT_FOLDERS, is_foreign
from fine_dist.artifacts.reading import inherited_facts, read_artifact
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError
from fine_dist.methods import check, from_manifest, loaded, parent_of
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import MANIFEST, Artifact, ArtifactManifest, load_artifact, save_artifact
from fine_dist.model.dit import DiT, labels_from_null


def descend(
    method: Method[MethodConfig], parent: Parent | None, target: Arch, seed: int, *, new_labels: bool = False
) -> Descent:
    """Initialize a target, as it is before stage 2. The result depends on the arguments alone.

    Args:
        method: The method that initializes the target.
        parent: The parent; None for a method that needs none.
        target: Architecture of the target.
        seed: Random seed of the initialization.
        new_labels: The target's classes are not the parent's. Its label embedder starts from the parent's null label
            plus a small random vector per class (`labels_from_null`), and is trained in stage 2.

    Raises:
        ArtifactError: The method cannot initialize such a target from this parent.
    """
    generator = torch.Generator().manual_seed(seed)
    parent, built_arch = check_target(method, parent, target, new_labels=new_labels)
    descent = method.descend(parent, built_arch, generator)
    if new_labels and parent is not None:
        model: Any
        descent.model.arch = target  # type: ignore[assignment]
        # The label embedders are replaced afterwards. A pool of models has several; listed first, as modules change.
        for model in [m for m in descent.model.modules() if isinstance(m, DiT)]:
            model.arch = model.arch.model_copy(update={"num_classes": target.num_classes})
            model.label = labels_from_null(model.label.weight.detach()[-1], target.num_classes, generator)
    return descent


def check_target(
    method: Method[MethodConfig], parent: Parent | None, target: Arch, *, new_labels: bool = False
) -> tuple[Parent | None, Arch]:
    """Check a target without building it; arguments as in `descend`.

    Returns:
        The parent that the method uses, and the architecture that it builds: the target's, with the parent's classes
        if new labels are added afterwards.

    Raises:
        ArtifactError: The method cannot initialize such a target from this parent.
    """
    if method.traits.parents == ("none",):
        parent = None  # a parent may be given for its architecture only
    if new_labels and parent is not None and "classes" not in method.traits.varies:
        target = target.model_copy(update={"num_classes": parent.arch.num_classes})
    check(method, parent.artifact if parent else None, target)
    return parent, target


def changed_tensors(model: nn.Module, parent: Parent | None) -> dict[str, Tensor]:
    """Return copies, on the CPU, of a target's tensors that differ from the parent's tensor of the same name."""
    parent_tensors = parent.artifact.tensors if parent else {}
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in model.state_dict().items()
        if not (name in parent_tensors and torch.equal(parent_tensors[name], tensor.detach().cpu()))
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
        folder: Folder of the artifact.
        method: Settings of the method.
        parent: The parent; None if the method needs none.
        arch: Architecture of the target.
        tensors: The target's tensors that differ from the parent's (`changed_tensors`).
        names: Names of all its tensors.
        facts: Further JSON values of the manifest: seed, losses, steps, learning rate, seconds.
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
    """Return the facts that a target inherits from its parent; class names only if the number of classes is equal."""
    facts = inherited_facts(parent.artifact.extra)
    if arch.num_classes != parent.arch.num_classes:
        facts.pop("class_names", None)
    return facts


def load_target(path: str | Path, learngene: str | Path | None = None) -> tuple[DiT, Artifact]:
    """Load a target and merge it into a dense DiT.

    Args:
        path: The target's artifact or run directory.
        learngene: Current location of its parent. Default: the recorded path, relative to the target or absolute.

    Returns:
        The model, and the target's artifact.

    Raises:
        ArtifactError: The target or its parent is missing or damaged, or the parent has another hash.
    """
    method, model, artifact = load_target_module(path, learngene)
    return merged(method, model), artifact


def load_target_module(
    path: str | Path, learngene: str | Path | None = None
) -> tuple[Method[MethodConfig], nn.Module, Artifact]:
    """Load a target without merging it: its method, its module and its artifact. Arguments as in `load_target`."""
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
    """Merge a method's module into a dense DiT that computes the same; return other products of methods unchanged."""
    if not method.traits.dense:
        return model  # type: ignore[return-value]
    dense = DiT(model.arch)  # type: ignore[arg-type]
    dense.load_state_dict(method.merge(model))
    return dense


def _assembled(artifact: Artifact, parent: Parent | None) -> nn.Module:
    """Return a module with the target's own tensors and those that it inherits from its parent."""
    parent_tensors = parent.artifact.tensors if parent else {}
    inherited = artifact.extra.get("inherited")
    if not isinstance(inherited, list) or not all(isinstance(name, str) for name in inherited):
        raise ArtifactError(f"{artifact.folder}: inherited in its manifest.json is no list of names: it is damaged")
    absent = [name for name in inherited if name not in parent_tensors]
    if absent:
        raise ArtifactError(f"{artifact.folder} takes {absent[0]} from its parent, which has no such tensor")
    state = {**{name: parent_tensors[name] for name in inherited}, **artifact.tensors}
    return loaded(from_manifest(artifact.method), artifact.arch, state, artifact.folder)


def _parent(artifact: Artifact, learngene: str | Path | None) -> Parent | None:
    """Load a target's parent and check its hash; None if the target has no parent."""
    named = artifact.extra.get("parent")
    if named is None:
        return None
    if not (isinstance(named, dict) and all(isinstance(named.get(key), str) for key in ("hash", "path", "from_here"))):
        raise ArtifactError(f"{artifact.folder}: parent in its manifest.json is damaged; copy the folder again")
    candidates = [artifact.folder / named["from_here"], Path(named["path"])]
    if learngene:
        given = Path(expand_path(str(learngene)))
        candidates = [given, *(given / name for name in ARTIFACT_FOLDERS)]
    folder = next((folder for folder in candidates if (folder / MANIFEST).is_file()), None)
    parent = load_artifact(folder) if folder is not None else _foreign_parent(artifact, named, candidates)
    if parent.hash != named["hash"]:
        raise ArtifactError(
            f"{artifact.folder} was made from the parent {named['hash'][:12]}..., and {parent.folder} is another one "
            f"({parent.hash[:12]}...); give the right one with --learngene FOLDER"
        )
    return parent_of(parent)


def _foreign_parent(artifact: Artifact, named: Mapping[str, Any], candidates: list[Path]) -> Artifact:
    """Load a parent that is another project's model: a file or folder among the candidates, or the recorded source."""
    try:
        hints = HintsConfig.model_validate(named.get("hints", {}))
    except ValidationError:
        raise ArtifactError(f"{artifact.folder}: parent.hints in its manifest.json is damaged; copy it again") from None
    sources = [path for path in candidates if path.exists() and is_foreign(path)]
    if not sources and isinstance(named.get("source"), str) and is_foreign(named["source"]):
        sources = [named["source"]]
    if sources:
        return read_artifact(sources[0], hints)
    raise ArtifactError(
        f"{artifact.folder} needs its parent (hash {named['hash'][:12]}...), which is not in "
        + " or ".join(str(p) for p in candidates[:2])
        + "; say where it lies now with --learngene FOLDER"
    )
