"""Tiny parents for every method: a learngene that the method condenses itself, or an ordinary model."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from fine_dist.core.config import validate
from fine_dist.methods import METHODS, build, parent_of
from fine_dist.methods.base import Descent, Method, Parent
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact, load_artifact, save_artifact
from fine_dist.model.dit import DiT
from tests.conftest import lively, tiny_arch

TINY: dict[str, dict[str, Any]] = {
    # settings for a width of 32 and few layers, where a paper's own suit large models
    "fine": {"rank": 24},
    "sws": {"stages": (1, 2, 1)},
    "sweet": {"components": 6},
    "tleg": {"auxiliary_layers": 3},
    "wave": {"side": 16},
}
WIDTHS: dict[str, int] = {"weight_selection": 16}
"""Another width for a target, where a method cannot go to twice the parent's."""
DEPTHS = (1, 2, 4, 6)
RANGES: dict[str, tuple[int, ...]] = {"ligo": (4, 6), "weight_selection": (1, 2, 4)}
"""Depths of targets, where a method goes from the parent's 4 in one direction alone."""


def tiny(name: str, **settings: Any) -> Method[Any]:
    """A method with settings that suit a tiny model."""
    kind = METHODS[name].Config
    return build(validate(kind, {"name": name, **TINY.get(name, {}), **settings}))


def trained(arch: Arch, seed: int = 0) -> DiT:
    """An ordinary model that has moved from its beginning."""
    return lively(DiT(arch), seed, std=0.15)  # type: ignore[return-value]


def moved(descent: Descent) -> torch.nn.Module:
    """A target as after some steps: what trains beside frozen parts has moved a little, anything else is drawn anew."""
    if descent.trains != "some":
        return lively(descent.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in descent.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return descent.model


def condensed(method: Method[Any], arch: Arch | None = None, seed: int = 0) -> tuple[Any, torch.nn.Module]:
    """(condensation, what is kept of it) of a method, at its beginning."""
    traits, arch = method.traits, method.auxiliary(arch or tiny_arch())
    ancestor = trained(arch if traits.same_shape else tiny_arch(num_layers=5)) if traits.ancestor != "no" else None
    condensation = method.condense(arch, ancestor, torch.Generator().manual_seed(seed))
    if method.traits.carries_over:
        method.carry_over(condensation.module, ancestor, torch.Generator().manual_seed(seed), torch.device("cpu"))
    return condensation, condensation.product(condensation.module)


def save(folder: Path, kind: str, method: Method[Any], module: torch.nn.Module) -> Artifact:
    arch: Any = module.arch
    settings = method.config.model_dump(mode="json")
    save_artifact(folder, kind=kind, method=settings, arch=arch, tensors=module.state_dict())
    return load_artifact(folder)


@functools.cache
def artifact_for(name: str) -> Artifact | None:
    """What a target of this method comes from; none for a method that needs nothing."""
    method, folder = tiny(name), Path(_folder().name) / name
    kinds = method.traits.parents
    if "learngene" in kinds:
        makers = [other for other in method.from_methods if tiny(other).traits.condenses]
        maker = makers[0] if makers else "fine"  # of one that takes any learngene
        module = lively(condensed(tiny(maker))[1], std=0.15)
        return save(folder, "learngene", tiny(maker), module)
    return save(folder, "model", tiny("scratch"), trained(tiny_arch())) if "model" in kinds else None


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="methods-")


def parent_for(name: str) -> Parent | None:
    artifact = artifact_for(name)
    return parent_of(artifact) if artifact else None


def targets_of(name: str) -> dict[str, Arch]:
    """Shapes of targets that a method says it can make, by what is different in them."""
    varies = METHODS[name](METHODS[name].Config(name=name)).traits.varies
    found = {
        f"L{depth}": tiny_arch(num_layers=depth)
        for depth in RANGES.get(name, DEPTHS)
        if "depth" in varies or depth == 4
    }
    if "width" in varies:
        found["wider"] = tiny_arch(
            num_layers=3 if "depth" in varies and name not in RANGES else 4, hidden_size=WIDTHS.get(name, 64)
        )
    if "classes" in varies and name in _with_parents():
        found["classes"] = tiny_arch(num_classes=7)
    return found


def _with_parents() -> list[str]:
    return [name for name in METHODS if tiny(name).traits.parents != ("none",)]
