"""Recognizing another project's model by its files, without torch: tensor files, diffusers folders, their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fine_dist.core import json_files
from fine_dist.core.errors import ArtifactError

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""Tensor files by the ends of their names."""
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""Models in diffusers that are DiTs. The second is what the published folders are called in their configs."""
"""Largest JSON file that is read: the index of a model of a million tensors is smaller."""


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder is a `DiTPipeline` or a `DiTTransformer2DModel`."""
    if (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") in DIFFUSERS_CLASSES


def check_regular(path: Path) -> None:
    """`ArtifactError` unless a path is a regular file: opening a pipe or a device could wait for ever."""
    if not path.exists():
        raise ArtifactError(f"{path}: no such file")
    if not path.is_file():
        kind = "folder" if path.is_dir() else "pipe, device or socket"
        raise ArtifactError(f"{path} is a {kind}, and a regular file is needed")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. `ArtifactError` when the file is none."""
    remedy = "copy the model's folder again"
    try:
        values = json_files.read_json(path, ArtifactError, remedy)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; {remedy}") from None
    record: dict[str, Any] = json_files.as_record(dict[str, Any], values, path, ArtifactError, remedy)
    return record
