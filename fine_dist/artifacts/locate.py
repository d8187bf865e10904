"""Finds a model by its path and tells artifacts from other projects' formats, without torch; `reading.py` reads it."""

from __future__ import annotations

from pathlib import Path

from fine_dist.artifacts.layouts import SUFFIXES, is_diffusers_folder
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError

ARTIFACT_FOLDERS = ("model", "target", "learngene")
"""Folders of a run directory that may hold an artifact, in order of preference."""
_FOLDERS = ("runs", "models", "data", "checkpoints", "output", "outputs")
"""Usual names of folders for models: `runs/dit` is taken for a path that does not exist, not for a hub name."""


def find_artifact(path: str | Path) -> Path:
    """Return the folder of an artifact: the path itself, or the artifact in a run directory.

    Raises:
        ArtifactError: The path does not exist, or there is no artifact in it.
    """
    folder = Path(expand_path(str(path)))
    artifact = _artifact_in(folder)
    if artifact is not None:
        return artifact
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist; give a folder that condense, init or train wrote")
    raise ArtifactError(
        f"{folder} holds no model, target or learngene: not a run's directory, or the run is not finished"
    )


def is_foreign(source: str | Path) -> bool:
    """Whether a source has another project's format: a tensor file, a diffusers folder, or a hub name."""
    path = Path(expand_path(str(source)))
    if path.is_dir():
        return _artifact_in(path) is None and is_diffusers_folder(path)
    return path.exists() or path.suffix in SUFFIXES or is_hub_name(source)


def is_hub_name(source: str | Path) -> bool:
    """Whether a source looks like OWNER/MODEL, neither it nor a folder OWNER exists, and OWNER is not in `_FOLDERS`."""
    text = str(source)
    owner, slash, name = text.partition("/")
    plain = bool(owner and slash and name) and "/" not in name and not text.startswith((".", "~", "$"))
    return plain and owner not in _FOLDERS and not Path(text).exists() and not Path(owner).is_dir()


def exists_locally(source: str | Path) -> bool:
    """Whether a source is an existing path on this machine."""
    return Path(expand_path(str(source))).exists()


def _artifact_in(folder: Path) -> Path | None:
    candidates = (folder, *(folder / name for name in ARTIFACT_FOLDERS))
    return next((candidate for candidate in candidates if (candidate / "manifest.json").is_file()), None)
