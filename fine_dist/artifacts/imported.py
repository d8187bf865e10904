"""A model of another project: its weights under this project's names, and what is known about it.

Letters: D width, L layers, p patch side, C latent channels.
"""

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
        arch: Its shape.
        state: Its tensors (float32, on the CPU) under the names of `fine_dist.model.dit.DiT`.
        source: The path or hub name it was read from.
        layout: `dit` (also fast-DiT's, SiT's and REPA's) or `diffusers`.
        sha256: Of the tensor file; of a file in pieces, of the pieces' hashes.
        licence: An SPDX name as a model card has it, or `unknown`. It goes into every manifest made from the model.
        diffusion: The process it was trained for, as far as its files say; `label_drop` 0 when it has no null label.
        scaling_factor: Of its VAE, where its files say.
        class_names: Names by label; empty where its files do not say.
        notes: What was assumed, taken off or dropped, for a person to read.
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
        """What a manifest should say about where its weights come from; JSON."""
        return {
            "source": self.source,
            "layout": self.layout,
            "sha256": self.sha256,
            "licence": self.licence,
            "prediction": self.diffusion.predicts,
        }


def heads_of(width: int, hint: int | None, named: int | None, where: str) -> int:
    """Attention heads: from the hint, the file, or DiT's size of this width. `ArtifactError` when none says."""
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
    """`ArtifactError` that lists missing and unknown tensors, when the names are not those of a DiT."""
    expected, names_in_file = set(expected), set(names_in_file)
    missing, foreign = sorted(expected - names_in_file), sorted(names_in_file - expected)
    if missing or foreign:
        parts = [f"{len(names)} {word}: {_some(names)}" for names, word in ((missing, "missing"), (foreign, "unknown"))]
        differences = "; ".join(part for part, names in zip(parts, (missing, foreign)) if names)
        raise ArtifactError(f"{where} does not have the tensors of {what} ({differences})")


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tensor(name: str, tensor: Tensor, where: str) -> None:
    """`ArtifactError` unless a tensor is an ordinary one: dense, in memory, floating-point, with numbers in it."""
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
    """The state in float32, every tensor finite and of the shape the architecture has. `ArtifactError` if not."""
    # Shapes are all that is needed here, and they cost no memory on the meta device.
    with torch.device("meta"):
        wanted = DiT(arch).state_dict()
    check_keys(wanted, state, where, arch.name)
    done = {}
    for name, model in wanted.items():
        tensor = state[name]
        if tensor.shape != model.shape:
            raise ArtifactError(
                f"{where}: {name} is {list(tensor.shape)}, and {arch.name} needs {list(model.shape)}; its tensors "
                "contradict each other"
            )
        check_tensor(name, tensor, where)
        tensor = tensor.detach().to(torch.float32).contiguous()
        # A diverged model loads and trains without an error, so it is refused where its file is still known.
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {name} has NaN or infinite entries; the checkpoint is damaged or diverged")
        done[name] = tensor
    return done


def read_int(shape: tuple[int, ...], axis: int, name: str, where: str, dims: int) -> int:
    """One side of a tensor that must have `dims` dimensions. `ArtifactError` when it has not."""
    if len(shape) != dims:
        raise ArtifactError(f"{where}: {name} is {list(shape)}, and a DiT's has {dims} dimensions")
    return shape[axis]
