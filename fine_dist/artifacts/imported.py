"""A model of another project: its weights under this project's names and its metadata; checks of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import ArtifactError
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.arch import SIZES, Arch
from fine_dist.model.dit import DiT

UNKNOWN_LICENCE = "unknown"
DIT_LICENCE = "cc-by-nc-4.0"
"""The licence of the weights that DiT's authors published (https://github.com/facebookresearch/DiT)."""


@dataclass(frozen=True)
class ImportedModel:
    """A dense DiT of another project.

    Args:
        arch: Architecture.
        state: Tensors, float32 on the CPU, under the names of `fine_dist.model.dit.DiT`.
        source: Path or hub name that it was read from.
        layout: File format: `dit` (also of fast-DiT, SiT and REPA) or `diffusers`.
        sha256: Hash of the tensor file; if the tensors are in several files, the hash of the files' hashes.
        licence: SPDX name of the weights' licence, or `unknown`. Manifests of models made from this one inherit it.
        diffusion: The process it was trained for. `label_drop` is 0 if the model has no null label.
        scaling_factor: Scaling factor of its autoencoder; None if the files do not state it.
        class_names: Class names by label; empty if the files do not state them.
        notes: Sentences for the user: what was assumed, and which prefixes and tensors were removed.
    """

    arch: Arch
    state: dict[str, Tensor]
    source: str
    layout: str
    sha256: str
    licence: str = UNKNOWN_LICENCE
    diffusion: DiffusionConfig = DiffusionConfig()
    scaling_factor: float | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def provenance(self) -> dict[str, Any]:
        """Return the origin of the weights as JSON values, for the manifest of an artifact made from this model."""
        return {
            "source": self.source,
            "layout": self.layout,
            "sha256": self.sha256,
            "licence": self.licence,
            "prediction": self.diffusion.predicts,
        }


def heads_of(width: int, hint: int | None, named: int | None, where: str) -> int:
    """Return the number of attention heads: the hint, the number named in the file, or that of DiT's size of the width.

    Raises:
        ArtifactError: None of the three is known, or the number does not divide the width.
    """
    usual = next((heads for size, _, heads in SIZES.values() if size == width), None)
    num_heads = hint or named or usual
    if num_heads is None:
        raise ArtifactError(
            f"{where}: a state dict does not say how many heads its attention has, and width {width} is not one of "
            f"DiT's ({', '.join(str(size) for size, _, _ in SIZES.values())}); give them with --hints.num-heads"
        )
    if width % num_heads:
        raise ArtifactError(f"{where}: num_heads {num_heads} does not divide the width {width}; see --hints.num-heads")
    return num_heads


def check_keys(expected: Iterable[str], names_in_file: Iterable[str], where: str, what: str) -> None:
    """Raise `ArtifactError`, which lists missing and unknown tensors, unless a file has exactly the expected names."""
    expected, names_in_file = set(expected), set(names_in_file)
    missing, foreign = sorted(expected - names_in_file), sorted(names_in_file - expected)
    if missing or foreign:
        parts = [f"{len(names)} {word}: {_some(names)}" for names, word in ((missing, "missing"), (foreign, "unknown"))]
        differences = "; ".join(part for part, names in zip(parts, (missing, foreign)) if names)
        raise ArtifactError(f"{where} does not have the tensors of {what} ({differences})")


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tensor(name: str, tensor: Tensor, where: str) -> None:
    """Raise `ArtifactError` unless a tensor is dense, floating-point, not quantized, not empty, and not on `meta`."""
    if tensor.is_meta:
        problem = "is on the meta device: the file has its shape and none of its numbers"
    elif tensor.is_quantized:
        problem = f"is quantized ({tensor.dtype}); dequantize it before it is saved"
    elif tensor.layout != torch.strided:
        problem = f"is sparse ({tensor.layout}); make it dense before it is saved"
    elif not tensor.is_floating_point():
        problem = f"holds {tensor.dtype}, not floating-point numbers"
    elif not tensor.numel():
        problem = (
            f"has no numbers ({list(tensor.shape)}), as a shard of ZeRO-3 or FSDP; gather the weights into one file "
            "first (DeepSpeed: zero_to_fp32.py)"
        )
    else:
        return
    raise ArtifactError(f"{where}: {name} {problem}")


def checked_state(state: Mapping[str, Tensor], arch: Arch, where: str) -> dict[str, Tensor]:
    """Return a state dict in float32, after checking names, shapes and values against an architecture.

    Raises:
        ArtifactError: A tensor is missing, unknown, of another shape, no ordinary tensor, or not finite.
    """
    with torch.device("meta"):  # only shapes are needed
        shapes = {name: tensor.shape for name, tensor in DiT(arch).state_dict().items()}
    check_keys(shapes, state, where, arch.name)
    checked = {}
    for name, shape in shapes.items():
        tensor = state[name]
        if tensor.shape != shape:
            raise ArtifactError(
                f"{where}: {name} is {list(tensor.shape)}, and {arch.name} needs {list(shape)}; its tensors "
                "contradict each other"
            )
        check_tensor(name, tensor, where)
        tensor = tensor.detach().to(torch.float32).contiguous()
        # A diverged model would load and train without an error.
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {name} has NaN or infinite entries; the checkpoint is damaged or diverged")
        checked[name] = tensor
    return checked


def read_int(shape: tuple[int, ...], axis: int, name: str, where: str, dims: int) -> int:
    """Return one side of a tensor's shape. Raises `ArtifactError` unless the tensor has `dims` dimensions."""
    if len(shape) != dims:
        raise ArtifactError(f"{where}: {name} is {list(shape)}, and a DiT's has {dims} dimensions")
    return shape[axis]
