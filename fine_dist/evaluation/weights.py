"""Weights of feature networks, from files that a user has; nothing in them is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError

_COUNTER = ".num_batches_tracked"
"""Batch normalisation's counter of training steps, which some files have and no answer depends on."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` by name. `ArtifactError` when there are none to be had."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(
            f"{path} is damaged, or holds more than tensors (nothing in it was run); give the published file of weights"
        ) from None
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {str(error).partition(chr(10))[0][:200]}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, and tensors by name are needed")
    return content


def check_tensors(model: nn.Module, state: dict[str, Any], where: str, what: str) -> None:
    """`ArtifactError` that names tensors that are missing, too many, or of another shape."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_COUNTER)}
    found = {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}
    missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [
        name
        for name in sorted(wanted.keys() & found.keys())
        if not isinstance(found[name], Tensor) or found[name].shape != wanted[name].shape
    ]
    told = [
        f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for names, word in ((missing, "missing"), (foreign, "unknown"), (wrong, "of another shape"))
        if names
    ]
    if told:
        raise ArtifactError(f"{where} does not hold the weights of {what}; tensors: {'; '.join(told)}")
