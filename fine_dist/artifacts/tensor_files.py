"""Reading other projects' tensor files without running code in them; finding a model's folder, here or on the hub.

A `.pt` goes through torch's restricted unpickler (`weights_only=True`), which builds tensors, numbers, texts and
containers of them and runs no code in the file. Of Python's classes it lets `argparse.Namespace` through, which DiT's
training script saves beside the weights and which does nothing when it is made.
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
from fine_dist.core.errors import ArtifactError
from fine_dist.core.files import sha256_of

_STEM = "diffusion_pytorch_model"


def read_tensor_file(path: Path) -> dict[str, Any]:
    """What a file holds: tensors by name, or a checkpoint's nested mapping. `ArtifactError` when it cannot be read."""
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
    # Allowed within this block only; a global allowance would apply to whatever the user's own program loads later.
    with torch.serialization.safe_globals([argparse.Namespace]):
        for mapped in (True, False):  # files of torch before 1.6 cannot be mapped
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
            except (
                RuntimeError,
                EOFError,
                ValueError,
                LookupError,
                OSError,
                AttributeError,
                TypeError,
                NotImplementedError,
            ) as error:
                # Mapping is tried first because a checkpoint with optimizer states is several
                # times the model's size, and only the pages of the weights are then read.
                if mapped and "mmap" in str(error):
                    continue
                raise ArtifactError(f"{path} is damaged or no checkpoint of torch: {_first_line(error)}") from None
    raise AssertionError("the second attempt returns or raises")


def read_weights_folder(folder: Path) -> tuple[dict[str, Tensor], str, str]:
    """The tensors of a diffusers model folder, in one file or in pieces; their hash; and the variant they are of.

    The variant is the word in `diffusion_pytorch_model.fp16.safetensors`, as `save_pretrained(variant="fp16")` writes
    it, or "" for none. Files without one are preferred, as the more exact ones, and safetensors before `.bin`.
    """
    files = sorted((parsed, path) for path in folder.glob(f"{_STEM}*") if (parsed := _parse_name(path)))
    if not files:
        raise ArtifactError(f"{folder} holds no {_STEM}.safetensors or .bin: copy the model's folder whole")
    (_, _, is_index, variant), file = files[0]
    if not is_index:
        return read_tensor_file(file), sha256_of(file), variant
    pieces = read_json(file).get("weight_map")
    if not isinstance(pieces, dict) or not all(isinstance(name, str) for name in pieces.values()):
        raise ArtifactError(f"{file}: weight_map must map names of tensors to names of files: the file is damaged")
    names = sorted(set(pieces.values()))
    # An index is data from outside: a name such as ../../x must not make this read other files.
    if not names or any(Path(name).name != name for name in names):
        raise ArtifactError(f"{file} names no files, or files outside its folder: {names[:5]}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(read_tensor_file(folder / name))
    return tensors, hashlib.sha256("".join(sha256_of(folder / name) for name in names).encode()).hexdigest(), variant


def _parse_name(path: Path) -> tuple[bool, bool, bool, str] | None:
    """(has a variant, is `.bin`, is an index, variant) of a weight file's name; the smallest is preferred.

    Pieces themselves (`-00001-of-00003`) and other names give None. diffusers writes the variant of an index as
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
    """The local copy of a model on the hub, downloaded if need be: its JSON, card, and tensor files.

    `ArtifactError` without network: one line that says what to download and how to name the folder.
    """
    wanted = ["*.json", "README.md", "transformer/*.safetensors", "transformer/*.bin", f"{_STEM}*"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except HFValidationError:
        raise ArtifactError(f"{name!r} is neither a file or folder here nor the name of a model on the hub") from None
    # The cause matters less to a user than what to do without a network, which is most clusters' compute nodes.
    except Exception as error:  # the hub's client raises what its transport raises
        raise ArtifactError(
            f"{name}: no such file or folder here, and the hub cannot be reached or has no such model "
            f"({type(error).__name__}); download the repository's transformer/, scheduler/, *.json and README.md where "
            "there is a network (`hf download`), copy the folder here, and give its path instead of the name"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
