"""Reads tensor files of other projects without executing code in them, and downloads models from the hub.

`.pt` files are read with torch's restricted unpickler (`weights_only=True`), which creates only tensors, numbers,
strings and containers of them. `argparse.Namespace` is allowed in addition, because DiT's training script saves its
arguments with the weights; creating one has no side effects.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fine_dist.artifacts.layouts import check_regular, read_json
from fine_dist.core.errors import ArtifactError, is_out_of_memory
from fine_dist.core.files import sha256_of

_STEM = "diffusion_pytorch_model"
"""Beginning of the names of diffusers' weight files."""


def read_tensor_file(path: Path) -> dict[str, Any]:
    """Read a `.safetensors` or `.pt` file: tensors by name, or the nested mapping of a checkpoint.

    Raises:
        ArtifactError: The file is missing, damaged, holds code, or is no mapping.
    """
    check_regular(path)
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
    # A context, because a global permission would also apply to files that the calling program loads later.
    with torch.serialization.safe_globals([argparse.Namespace]):
        # Memory-mapped if possible: a checkpoint with optimizer states is several times the model's
        # size, and only the pages of the weights are then read. Files of torch before 1.6 cannot be mapped.
        for mapped in (True, False):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except pickle.UnpicklingError as error:
                message = str(error)
                if "weights_only" in message.lower() or "unsupported" in message.lower():
                    raise ArtifactError(
                        f"{path} holds more than tensors and plain values, and nothing in it was run: save its state "
                        "dict alone (torch.save(model.state_dict(), ...)), or as safetensors"
                    ) from None
                raise ArtifactError(f"{path} is damaged or no checkpoint of torch: {_first_line(error)}") from None
            except (RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError) as error:
                if mapped and "mmap" in str(error):
                    continue
                # A damaged file may state any size, so that lack of memory alone does not tell the two apart.
                what = "is damaged or no checkpoint of torch"
                if is_out_of_memory(error):
                    what = "needs more memory than there is, or is damaged"
                raise ArtifactError(f"{path} {what}: {_first_line(error)}") from None
    raise AssertionError("the second attempt returns or raises")


def read_weights_folder(folder: Path) -> tuple[dict[str, Tensor], str, str]:
    """Read the weights in a model folder of diffusers, which are in one file or in several with an index.

    Files without a variant are preferred, because variants usually have a lower precision, then safetensors to `.bin`.

    Returns:
        The tensors by name, their sha256, and the variant of the file, such as fp16, or "" without one.

    Raises:
        ArtifactError: There are no weights, or a file is missing or damaged.
    """
    files = sorted((parsed, path) for path in folder.glob(f"{_STEM}*") if (parsed := _parse_name(path)))
    if not files:
        raise ArtifactError(f"{folder} holds no {_STEM}.safetensors or .bin: copy the model's folder whole")
    (_, _, is_index, variant), file = files[0]
    if not is_index:
        return read_tensor_file(file), sha256_of(file), variant
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ArtifactError(f"{file}: weight_map must map names of tensors to names of files: the file is damaged")
    names = sorted(set(weight_map.values()))
    # The index is not trusted: a name such as ../../x must not read files outside the folder.
    if not names or any(Path(name).name != name for name in names):
        raise ArtifactError(f"{file} names no files, or files outside its folder: {names[:5]}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(read_tensor_file(folder / name))
    return tensors, hashlib.sha256("".join(sha256_of(folder / name) for name in names).encode()).hexdigest(), variant


def _parse_name(path: Path) -> tuple[bool, bool, bool, str] | None:
    """Return (has a variant, is `.bin`, is an index, variant) of a weight file; the smallest tuple is preferred.

    None for parts of sharded weights (`-00001-of-00003`) and other names. diffusers writes the variant of an index as
    `MODEL.safetensors.index.fp16.json`, and older versions as `MODEL.fp16.safetensors.index.json`.
    """
    match = re.fullmatch(
        rf"{_STEM}(?:\.(?P<a>\w+))?\.(?P<kind>safetensors|bin)(?P<index>\.index(?:\.(?P<b>\w+))?\.json)?", path.name
    )
    if match is None:
        return None
    variant = match["a"] or match["b"] or ""
    return bool(variant), match["kind"] == "bin", match["index"] is not None, variant


def fetch(name: str) -> Path:
    """Download a model's JSON files, card and tensors from the hub, unless they are cached, and return their folder.

    Raises:
        ArtifactError: The hub cannot be reached or has no such model; the message says what to download by hand.
    """
    patterns = ["*.json", "README.md", "transformer/*.safetensors", "transformer/*.bin", f"{_STEM}*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise ArtifactError(f"{name!r} is neither a file or folder here nor the name of a model on the hub") from None
    except Exception as error:  # the hub's client also passes on the exceptions of its HTTP library
        # Compute nodes of most clusters have no network, so the message says what to do without one.
        raise ArtifactError(
            f"{name}: no such file or folder here, and the hub cannot be reached or has no such model "
            f"({type(error).__name__}); download the repository's transformer/, scheduler/, *.json and README.md where "
            "there is a network (`hf download`), copy the folder here, and give its path instead of the name"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
