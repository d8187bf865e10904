"""Parents of the kinds that methods take, small and lively, through real artifacts."""

from __future__ import annotations

from pathlib import Path

import torch

from fine_dist.artifacts.targets import load_target_module, own_tensors, save_target
from fine_dist.methods import METHODS, build, parent_of
from fine_dist.methods.base import Method, Parent
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from tests.conftest import lively, tiny_arch


def method_of(name: str, **settings) -> Method:
    return build(METHODS[name].Config(name=name, **settings))


def model_parent(folder: Path, std: float = 0.2, **fields) -> Parent:
    """A trained-looking dense model on disk, read again."""
    model = lively(DiT(tiny_arch(**fields)), std=std)
    save_artifact(folder, kind="model", method={"name": "scratch"}, arch=model.arch, tensors=model.state_dict())
    return parent_of(load_artifact(folder))


def nudge(model: torch.nn.Module, std: float = 0.05, seed: int = 5) -> torch.nn.Module:
    """Whatever trains has moved a little, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def saved_and_read(folder: Path, method: Method, model: torch.nn.Module, parent: Parent | None):
    """A target through its artifact: the module that comes back, and the names it took from its parent."""
    own = own_tensors(model, parent)
    settings = method.config.model_dump(mode="json")
    save_target(
        folder,
        method=settings,
        parent=parent,
        arch=model.arch,
        own=own,
        names=list(model.state_dict()),
        facts={},
    )
    _, back, artifact = load_target_module(folder)
    return back, artifact.extra["inherited"]


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def dense(method: Method, model: torch.nn.Module) -> DiT:
    """The merged model; loading is strict, so names and shapes are a dense DiT's."""
    merged = DiT(model.arch)
    merged.load_state_dict(method.merge(model))
    return merged
