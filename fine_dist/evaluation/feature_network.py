"""The interface of feature networks, and reading the weights of published networks.

Shapes: N images, F pooled features, S spatial features, K classes of its own, C channels, H, W pixels.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError, is_out_of_memory
from fine_dist.core.regular_files import check_regular
from fine_dist.sampling.image_grid import to_uint8


@dataclass(frozen=True)
class Extracted:
    """Features of a batch, float32: pooled [N, F]; spatial [N, S] and logits [N, K] if the network has them."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Features(Protocol):
    """A frozen network: `features(images) -> Extracted`, computed on the device of its weights.

    name:         `inception`, `dinov2` or `classifier`.
    distance:     name of the Fréchet distance on its pooled features: FID, FDD, FD-classifier.
    num_features: F.
    identity:     sha256 of its weights (or their file); only scores with equal identities are comparable.
    """

    @property
    def name(self) -> str: ...
    @property
    def distance(self) -> str: ...
    @property
    def num_features(self) -> int: ...
    @property
    def identity(self) -> str: ...

    def __call__(self, images: Tensor) -> Extracted:
        """Features of a batch of images.

        Args:
            images: uint8 [N, C, H, W], or floating point in [-1, 1]; C is 1 or 3.

        Raises:
            DataError: The images do not fit this network.
        """


def as_rgb(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] of any images that `to_uint8` takes; gray images are repeated in all three channels."""
    images = to_uint8(images)
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)


def as_signed(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images; floating point as it is."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


# --- weights from files that a user has; no code in them is run -----------------------------------------------------

_COUNTER = ".num_batches_tracked"
"""Batch normalization's counter of training steps, which some files contain and evaluation does not use."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file by name. `ArtifactError` when it cannot be read."""
    try:
        check_regular(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(
            f"{path} is damaged, or holds more than tensors (nothing in it was run); give the published file of weights"
        ) from None
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        # A damaged file may state any size, so that lack of memory alone does not tell the two apart.
        what = "needs more memory than there is, or is damaged" if is_out_of_memory(error) else "is damaged"
        raise ArtifactError(f"{path} {what}: {str(error).partition(chr(10))[0][:200]}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, and tensors by name are needed")
    return content


def check_tensors(model: nn.Module, state: dict[str, Any], where: str, what: str) -> None:
    """Check names and shapes of tensors. `ArtifactError` names those that are missing, unknown, or of another shape."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_COUNTER)}
    given = {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}
    missing, foreign = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    wrong = [
        name
        for name in sorted(wanted.keys() & given.keys())
        if not isinstance(given[name], Tensor) or given[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {word} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for names, word in ((missing, "missing"), (foreign, "unknown"), (wrong, "of another shape"))
        if names
    ]
    if problems:
        raise ArtifactError(f"{where} does not hold the weights of {what}; tensors: {'; '.join(problems)}")
