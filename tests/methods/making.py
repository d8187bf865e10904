"""Every method as a case of the contract, at sizes for tests, and what tests of single methods take from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fine_dist.artifacts.targets import changed_tensors, load_target_module, save_target
from fine_dist.core.config import validate
from fine_dist.methods import METHODS, build, parent_of
from fine_dist.methods.base import Method, Parent
from fine_dist.methods.fine.config import FineConfig
from fine_dist.model.artifact import Artifact, load_artifact, save_artifact
from fine_dist.model.dit import DiT
from fine_dist.testing import MethodContract, condensed, lively, moved, saved, tiny_arch, trained

TINY: dict[str, dict[str, Any]] = {
    # settings for a width of 32 and few layers, where a paper's own suit large models
    "fine": {"rank": 24},
    "sws": {"stages": (1, 2, 1)},
    "sweet": {"components": 6},
    "tleg": {"auxiliary_layers": 3},
    "wave": {"side": 16},
}
CASES: dict[str, type[MethodContract]] = {
    name: type(
        f"Test_{name}",
        (MethodContract,),
        {"name": name, "settings": TINY.get(name, {}), "learngene": FineConfig(rank=24)},
    )
    for name in METHODS
}
# methods that go from the parent's size in one direction alone
CASES["ligo"].depths, CASES["ligo"].wide_depth = (4, 6), 4  # type: ignore[misc]
selection = CASES["weight_selection"]
selection.depths, selection.wide_depth, selection.width = (1, 2, 4), 4, 16  # type: ignore[misc]


def tiny(name: str, **settings: Any) -> Method[Any]:
    """A method with settings that suit a tiny model."""
    kind = METHODS[name].Config
    return build(validate(kind, {"name": name, **TINY.get(name, {}), **settings}))


def artifact_for(name: str) -> Artifact | None:
    """What a target of this method comes from; none for a method that needs nothing."""
    return CASES[name].artifact()


def parent_for(name: str) -> Parent | None:
    return CASES[name].parent()


def method_of(name: str, **settings: Any) -> Method[Any]:
    return build(METHODS[name].Config(name=name, **settings))


def model_parent(folder: Path, std: float = 0.2, **fields: Any) -> Parent:
    """A trained-looking dense model on disk, read again."""
    model = lively(DiT(tiny_arch(**fields)), std=std)
    save_artifact(folder, kind="model", method={"name": "scratch"}, arch=model.arch, tensors=model.state_dict())
    return parent_of(load_artifact(folder))


def nudge(model: torch.nn.Module, std: float = 0.05, seed: int = 5) -> torch.nn.Module:
    """Moves what trains a little, as some steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def saved_and_read(folder: Path, method: Method[Any], model: torch.nn.Module, parent: Parent | None):
    """A target through its artifact: the module that comes back, and the names it took from its parent."""
    own = changed_tensors(model, parent)
    settings = method.config.model_dump(mode="json")
    save_target(
        folder,
        method=settings,
        parent=parent,
        arch=model.arch,
        tensors=own,
        names=list(model.state_dict()),
        facts={},
    )
    _, back, artifact = load_target_module(folder)
    return back, artifact.extra["inherited"]


def num_trained(model: torch.nn.Module) -> int:
    """Number of values that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def dense(method: Method[Any], model: torch.nn.Module) -> DiT:
    """The merged model; loading is strict, so names and shapes are a dense DiT's."""
    merged = DiT(model.arch)
    merged.load_state_dict(method.merge(model))
    return merged


__all__ = [
    "CASES",
    "TINY",
    "artifact_for",
    "condensed",
    "dense",
    "method_of",
    "model_parent",
    "moved",
    "nudge",
    "num_trained",
    "parent_for",
    "saved",
    "saved_and_read",
    "tiny",
    "trained",
]
