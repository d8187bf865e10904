"""Stage 3: train an ordinary dense DiT from what a parent gives, or from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fine_dist.config import expand_path
from fine_dist.errors import ConfigError
from fine_dist.methods import SCRATCH, AnyMethod, Condensation, Method, build, from_manifest, parent_of
from fine_dist.model.zoo import Arch
from fine_dist.stages.build import Plan
from fine_dist.stages.config import Blueprint, StageConfig
from fine_dist.stages.load import find_artifact, hash_of, load_model
from fine_dist.stages.run import train_stage
from fine_dist.stages.targets import descend

if TYPE_CHECKING:
    from torch import nn

    from fine_dist.engine.dist import World


class TrainConfig(StageConfig):
    """Stage 3: train a dense DiT with all its weights free, a fresh optimiser and a fresh EMA."""

    run_dir: str = "runs/train"
    """Where everything is written; the model lands in its `model/`."""
    parent: str | None = None
    """Folder of an initialised target, a model or a learngene: trained as it is, or what `method` makes a target of."""
    learngene: str | None = None
    """Where the learngene of an initialised target lies now, when it has moved."""
    arch: Arch | None = None
    """Architecture; none: that of the parent."""
    method: AnyMethod | None = None
    """How the weights begin; none: as in the parent, or from scratch where there is no parent."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """What is outside the blocks (embedders, final layer) begins as the parent or method has it, or from scratch: what
    the blocks alone are worth."""

    def origin(self) -> dict[str, Any]:
        from fine_dist.model.artifact import read_manifest

        arch = self.arch
        if arch is None and self.parent:
            arch = Arch.model_validate(read_manifest(find_artifact(self.parent))["arch"])
        return {
            "arch": arch.model_dump() if arch else None,
            "method": self.method.model_dump(mode="json") if self.method else None,
            "origin": hash_of(self.parent) if self.parent else None,
            **({} if self.shell == "inherited" else {"shell": self.shell}),
        }

    def blueprint(self) -> Blueprint | None:
        import torch

        from fine_dist.model.artifact import read_manifest
        from fine_dist.model.dit import DiT

        arch = self.arch
        if arch is None and self.parent and Path(expand_path(self.parent)).exists():
            arch = Arch.model_validate(read_manifest(find_artifact(self.parent))["arch"])
        if arch is None:
            return None
        with torch.device("meta"):
            return Blueprint(arch, DiT(arch), build(self.method or SCRATCH))


def begin(config: TrainConfig) -> tuple[nn.Module, Method[Any], str | None]:
    """The model before training, the method it comes from, and the hash of what it comes from."""
    from fine_dist.model.artifact import load_artifact

    if config.method is None and config.parent:
        model, about = load_model(config.parent, config.learngene)
        if config.arch is not None and model.arch != config.arch:
            raise ConfigError(
                f"arch: {config.parent} is {model.arch}, and the config says {config.arch}; leave arch out, or name "
                "the method that makes a target of another shape"
            )
        return model.requires_grad_(True), from_manifest(about["method"]), about["hash"]
    parent = parent_of(load_artifact(find_artifact(config.parent))) if config.parent else None
    arch = config.arch or (parent.arch if parent else None)
    if arch is None:
        raise ConfigError("arch: give an architecture (such as DiT-B/2-L6), or a parent to take it from")
    method = build(config.method or SCRATCH)
    descent = descend(method, parent, arch, config.seed)
    if descent.trains != "nothing":
        raise ConfigError(
            f"method.name: a {method.config.name} target is made by fine_dist.init; give its folder as parent"
        )
    return descent.model, method, parent.artifact.hash if parent else None


def with_fresh_shell(model: nn.Module, seed: int) -> None:
    """What is outside the blocks as a model of this shape has it from scratch; the blocks stay as they are."""
    import torch

    from fine_dist.model.dit import DiT
    from fine_dist.model.roles import of_role

    arch: Any = model.arch
    fresh = of_role(DiT(arch, generator=torch.Generator().manual_seed(seed)), "shell")
    for name, own in of_role(model, "shell").items():
        own.copy_(fresh[name])


def run(config: TrainConfig) -> Path:
    """Train the model; returns its folder. Raises `ResumeLater` when stopped early."""

    def make(world: World) -> Plan:
        model, method, origin = begin(config)
        if config.shell == "scratch":
            with_fresh_shell(model, config.seed)
        return Plan(
            Condensation(model, before_step=method.before_step(model)),
            arch=model.arch,  # type: ignore[arg-type]
            method=method,
            about={"parent": config.parent, "origin": origin},
            draws=False,
        )

    return train_stage(config, "train", "model", make)
