"""Any dense DiT by a path or a name: which reader is asked is told by what lies there."""

from __future__ import annotations

from pathlib import Path

from fine_dist.artifacts.diffusers_folder import is_diffusers_folder, read_diffusers
from fine_dist.artifacts.dit_pt import read_dit
from fine_dist.artifacts.imported import NO_HINTS, UNKNOWN_LICENCE, Hints, ImportedModel, finish
from fine_dist.artifacts.tensor_files import SUFFIXES
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.artifact import MANIFEST, load_artifact


def load(source: str | Path, hints: Hints = NO_HINTS) -> ImportedModel:
    """A model of this project's (`kind: model`), a diffusers folder, a state dict's file, or a name on the hub.

    `ArtifactError` in one line when it is none of these, damaged, foreign, or cannot be downloaded.
    """
    path = Path(expand_path(str(source)))
    if (path / MANIFEST).is_file():
        return read_own(path, hints)
    if path.is_dir():
        if is_diffusers_folder(path):
            return read_diffusers(path, hints)
        raise ArtifactError(
            f"{path} holds no model: neither a {MANIFEST} of this project's nor "
            "diffusers' model_index.json or config.json"
        )
    if path.is_file() or path.suffix in SUFFIXES:
        return read_dit(path, hints)
    if path.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise ArtifactError(f"{source}: no such file or folder, and a name on the hub looks like OWNER/MODEL")
    return read_diffusers(str(source), hints)


def read_own(folder: str | Path, hints: Hints = NO_HINTS) -> ImportedModel:
    """A dense model that this project wrote. `ArtifactError` when it is damaged, or a learngene or scalers."""
    artifact = load_artifact(folder, "model")
    extra = artifact.extra
    diffusion = extra.get("diffusion")
    licence = hints.licence or extra.get("licence") or (extra.get("ancestor") or {}).get("licence")
    return ImportedModel(
        arch=artifact.arch,
        state=finish(artifact.tensors, artifact.arch, str(folder)),
        source=str(folder),
        layout="fine_dist",
        sha256=artifact.hash,
        licence=licence or UNKNOWN_LICENCE,
        diffusion=DiffusionConfig.model_validate(diffusion) if isinstance(diffusion, dict) else DiffusionConfig(),
        class_names=tuple(extra.get("class_names", ())),
    )
