"""Recognizes the file formats of other projects' models, without torch: tensor files, diffusers folders, their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fine_dist.core import json_files
from fine_dist.core.errors import ArtifactError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""Suffixes of tensor files."""
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""Classes of diffusers that are DiTs, as configs name them. The published folders have the second."""


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder looks like a pipeline of diffusers or a `DiTTransformer2DModel`. Reading it checks its class."""
    if (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") in DIFFUSERS_CLASSES


def check_regular(path: Path) -> None:
    """Raise `ArtifactError` unless a path is a regular file; opening a pipe or a device could block forever."""
    if not path.exists():
        raise ArtifactError(f"{path}: no such file")
    if not path.is_file():
        kind = "folder" if path.is_dir() else "pipe, device or socket"
        raise ArtifactError(f"{path} is a {kind}, and a regular file is needed")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `ArtifactError` if the file is missing, damaged or holds another value."""
    remedy = "copy the model's folder again"
    try:
        value = json_files.read_json(path, ArtifactError, remedy)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; {remedy}") from None
    values: dict[str, Any] = json_files.as_record(dict[str, Any], value, path, ArtifactError, remedy)
    return values
