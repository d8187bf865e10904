"""Small models for tests: an architecture, random weights, a method's learngene and targets, and inputs.

Shapes: B batch, C latent channels, H latent side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.config import validate
from fine_dist.methods.base import Condensation, Descent, Method
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact, load_artifact, save_artifact
from fine_dist.model.dit import DiT


def tiny_arch(**fields: Any) -> Arch:
    """A DiT small enough for a test: width 32, 4 layers, 4 heads, 16 tokens of a 1x8x8 latent, 10 classes."""
    tiny = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "patch_size": 2, "in_channels": 1, "input_size": 8}
    return validate(Arch, {**tiny, "num_classes": 10, "learn_sigma": False, **fields})


def lively(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """The model with random normal parameters, so that no parameter is zero and every path affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def inputs(arch: Arch, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(z [B, C, H, H], t [B], y [B]) for a forward pass."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, *arch.latent_shape, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    y = torch.randint(0, arch.num_classes + 1, (batch,), generator=generator)
    return z, t, y


def trained(arch: Arch, seed: int = 0) -> DiT:
    """An ordinary model with random parameters, in place of a trained one."""
    return lively(DiT(arch), seed, std=0.15)  # type: ignore[return-value]


def moved(descent: Descent) -> nn.Module:
    """A target as after some steps: trained parameters are perturbed; without frozen parts all are random."""
    if descent.trains != "some":
        return lively(descent.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in descent.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return descent.model


def condensed(method: Method[Any], arch: Arch | None = None, seed: int = 0) -> tuple[Condensation, nn.Module]:
    """(condensation, its learngene module) of a method before training."""
    traits, arch = method.traits, method.auxiliary(arch or tiny_arch())
    ancestor = trained(arch if traits.same_shape else arch.with_depth(5)) if traits.ancestor != "no" else None
    condensation = method.condense(arch, ancestor, torch.Generator().manual_seed(seed))
    if traits.carries_over:
        assert ancestor is not None, "a method that carries over weights takes an ancestor"
        generator = torch.Generator().manual_seed(seed)
        method.carry_over(condensation.module, ancestor, generator, torch.device("cpu"))
    return condensation, condensation.product(condensation.module)


def saved(folder: Path, kind: str, method: Method[Any], module: nn.Module) -> Artifact:
    """A learngene or model that was written to disk and read again."""
    arch: Any = module.arch
    settings = method.config.model_dump(mode="json")
    save_artifact(folder, kind=kind, method=settings, arch=arch, tensors=module.state_dict())
    return load_artifact(folder)


class NoiseBatch:
    """A batch of noise with every label."""

    def __init__(self, step: int, arch: Arch) -> None:
        generator = torch.Generator().manual_seed(step)
        self.step, self.labels = step, torch.arange(arch.num_classes)
        self.latents = torch.randn(arch.num_classes, *arch.latent_shape, generator=generator)
        self.positions = torch.arange(arch.num_classes)
