"""Reading other projects' tensor files without running anything in them; finding a model's folder, here or on the hub.

A `.pt` is read with `weights_only=True` and holds tensors, numbers, texts and containers of them, nothing else; of
Python's classes `argparse.Namespace` alone is let through, which DiT's training script saves beside the weights and
which does nothing when it is made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import ArtifactError
from fine_dist.core.files import sha256_of

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
"""Tensor files by the ends of their names."""
_STEM = "diffusion_pytorch_model"


def read_tensor_file(path: Path) -> dict[str, Any]:
    """What a file holds: tensors by name, or a checkpoint's nested mapping. `ArtifactError` when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged or no safetensors file: {_first_line(error)}") from None
    content = _read_pt(path)
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, and a state dict (a mapping) is needed")
    return content


def _read_pt(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]):
        for mapped in (True, False):  # files of torch before 1.6 cannot be mapped
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except pickle.UnpicklingError as error:
                told = str(error)
                if "weights_only" in told.lower() or "unsupported" in told.lower():
                    raise ArtifactError(
                        f"{path} holds more than tensors and plain values, and nothing in it was run: save its state "
                        "dict alone (torch.save(model.state_dict(), ...)), or as safetensors"
                    ) from None
                raise ArtifactError(f"{path} is damaged or no checkpoint of torch: {_first_line(error)}") from None
            except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
                if mapped and "mmap" in str(error):
                    continue
                raise ArtifactError(f"{path} is damaged or no checkpoint of torch: {_first_line(error)}") from None
    raise AssertionError("the second attempt returns or raises")


def read_weights_folder(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a diffusers model folder, in one file or in pieces, and their hash."""
    for suffix in ("safetensors", "bin"):
        whole, index = folder / f"{_STEM}.{suffix}", folder / f"{_STEM}.{suffix}.index.json"
        if whole.is_file():
            return read_tensor_file(whole), sha256_of(whole)
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            if any(Path(name).name != name for name in names):
                raise ArtifactError(f"{index} names files outside its folder: {names}")
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors.update(read_tensor_file(folder / name))
            return tensors, hashlib.sha256("".join(sha256_of(folder / name) for name in names).encode()).hexdigest()
    raise ArtifactError(f"{folder} holds no {_STEM}.safetensors or .bin: copy the model's folder whole")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping. `ArtifactError` when it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{path}: a mapping is needed, not {type(values).__name__}")
    return values


def fetch(name: str) -> Path:
    """The local copy of a model on the hub, downloaded if need be: its JSON, card, and tensor files.

    `ArtifactError` without network: one line that says what to download and how to name the folder.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "README.md", "transformer/*.safetensors", "transformer/*.bin", f"{_STEM}*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except HFValidationError:
        raise ArtifactError(f"{name!r} is neither a file or folder here nor the name of a model on the hub") from None
    except Exception as error:  # the hub's client raises what its transport raises
        raise ArtifactError(
            f"{name}: no such file or folder here, and the hub cannot be reached or has no such model "
            f"({type(error).__name__}); download the repository's transformer/, scheduler/, *.json and README.md where "
            "there is a network (`hf download`), copy the folder here, and give its path instead of the name"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
