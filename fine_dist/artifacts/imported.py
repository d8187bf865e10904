"""What comes in from another project: weights under this project's names, and what is known about them.

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

UNKNOWN_LICENCE = "unknown"
DIT_LICENCE = "cc-by-nc-4.0"
"""The licence of the weights that DiT's authors published (https://github.com/facebookresearch/DiT)."""


@dataclass(frozen=True)
class ImportedModel:
    """A dense DiT from elsewhere.

    arch, state:     its shape, and its tensors (float32, on the CPU) under the names of `fine_dist.model.dit.DiT`.
    source:          the path or hub name it was read from.
    layout:          `dit` (also fast-DiT's and SiT's), `diffusers` or `fine_dist`.
    sha256:          of the tensor file; of a file in pieces, of the pieces' hashes.
    licence:         an SPDX name as a model card has it, or `unknown`. It goes into every manifest made from it.
    diffusion:       the process it was trained for, as far as its files say; `label_drop` 0 when it has no null label.
    prediction:      `noise`, or `velocity` for SiT: a start for training then, never a teacher or a sampler's model.
    scaling_factor:  of its VAE, where its files say.
    class_names:     by label; empty where its files do not say.
    notes:           what was decided for want of a word in the files; for a person to read.
    """

    arch: Arch
    state: dict[str, Tensor]
    source: str
    layout: str
    sha256: str
    licence: str = UNKNOWN_LICENCE
    diffusion: DiffusionConfig = DiffusionConfig()
    prediction: str = "noise"
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
            "prediction": self.prediction,
        }


@dataclass(frozen=True)
class Hints:
    """What a file may not say. None or `auto`: as the file says, or as is usual.

    num_heads:       attention heads; known by width for DiT's sizes S, B, L, XL.
    num_classes:     classes without the null label; by default one less than the label table has rows.
    input_size:      side of a latent; read from the position table or the config where there is one.
    weights:         `ema` or `model`, where a checkpoint holds both; `auto` prefers the average.
    frequency_shift: 0 or 1, see `Arch.frequency_shift`.
    licence:         of the weights, as an SPDX name.
    """

    num_heads: int | None = None
    num_classes: int | None = None
    input_size: int | None = None
    weights: str = "auto"
    frequency_shift: int | None = None
    licence: str | None = None


NO_HINTS = Hints()


def heads_of(width: int, hint: int | None, named: int | None, where: str) -> int:
    """Heads: said by the user, by the file, or usual for this width. `ArtifactError` when nobody knows."""
    usual = next((heads for size, _, heads in SIZES.values() if size == width), None)
    found = hint or named or usual
    if found is None:
        raise ArtifactError(
            f"{where}: a state dict does not say how many heads its attention has, and width {width} is none of DiT's "
            f"({', '.join(str(size) for size, _, _ in SIZES.values())}); say it with num_heads"
        )
    if width % found:
        raise ArtifactError(f"{where}: num_heads {found} does not divide the width {width}")
    return found


def check_keys(expected: Iterable[str], found: Iterable[str], where: str, what: str) -> None:
    """`ArtifactError` that lists what is missing and what is too much, when the names are not those of a DiT."""
    expected, found = set(expected), set(found)
    missing, foreign = sorted(expected - found), sorted(found - expected)
    if missing or foreign:
        parts = [f"{len(names)} {word}: {_some(names)}" for names, word in ((missing, "missing"), (foreign, "unknown"))]
        told = "; ".join(part for part, names in zip(parts, (missing, foreign)) if names)
        raise ArtifactError(f"{where} does not have the tensors of {what} ({told})")


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def finish(state: Mapping[str, Tensor], arch: Arch, where: str) -> dict[str, Tensor]:
    """The state in float32, every tensor of the shape that the architecture has, and finite. `ArtifactError` if not."""
    from fine_dist.model.dit import DiT

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
        if not tensor.is_floating_point():
            raise ArtifactError(f"{where}: {name} holds {tensor.dtype}, not floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where}: {name} has NaN or infinite entries; the checkpoint is damaged or diverged")
        done[name] = tensor.detach().to(torch.float32).contiguous()
    return done


def read_int(shape: tuple[int, ...], axis: int, name: str, where: str, dims: int) -> int:
    """One side of a tensor that must have `dims` dimensions. `ArtifactError` when it has not."""
    if len(shape) != dims:
        raise ArtifactError(f"{where}: {name} is {list(shape)}, and a DiT's has {dims} dimensions")
    return shape[axis]
