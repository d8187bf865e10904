"""Stage 1: train a learngene of an architecture, from random genes or from an ancestor's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_dist.config import expand_path
from fine_dist.errors import ConfigError
from fine_dist.methods import CONDENSES, AnyMethod, Weights, build
from fine_dist.model.zoo import Arch
from fine_dist.stages.build import Plan, check_teacher, weights_of
from fine_dist.stages.config import Blueprint, LossConfig, StageConfig
from fine_dist.stages.load import load_model
from fine_dist.stages.run import train_stage

if TYPE_CHECKING:
    from fine_dist.engine.dist import World
    from fine_dist.model.dit import DiT


class CondenseConfig(StageConfig):
    """Stage 1: train a learngene of an ancestor's architecture, from random genes or from an ancestor's weights."""

    run_dir: str = "runs/condense"
    """Where everything is written; the learngene lands in its `learngene/`."""
    arch: Arch = Field(default_factory=Arch)
    """Shape of the model that stage 1 trains; its depth is the method's own where it has a setting for it."""
    method: AnyMethod = CONDENSES
    """How layers share weights."""
    ancestor: str | None = None
    """Folder of a trained model: what the method begins with, and what distillation imitates."""
    ancestor_licence: str | None = None
    """Licence of the ancestor's weights; kept in the learngene's manifest."""
    loss: LossConfig = LossConfig()
    """Terms of the loss and their weights."""

    @property
    def trained_arch(self) -> Arch:
        """Shape of what is trained and kept: `arch`, in the depth that the method sets if it does."""
        return build(self.method).auxiliary(self.arch)

    @property
    def weights(self) -> Weights:
        """Of the loss's terms: the user's over the method's own."""
        return weights_of(self.loss, build(self.method).traits.loss)

    @property
    def imitates(self) -> bool:
        """Whether a term of the loss imitates the ancestor."""
        return self.weights.output > 0 or self.weights.features > 0

    def blueprint(self) -> Blueprint:
        import torch

        method = build(self.method)
        arch = self.trained_arch
        with torch.device("meta"):
            module = method.blueprint(arch)
        return Blueprint(arch, module, method, self._teacher_arch())

    def _teacher_arch(self) -> Arch | None:
        from fine_dist.model.artifact import read_manifest
        from fine_dist.stages.load import find_artifact

        if not (self.ancestor and self.imitates):
            return None
        if not Path(expand_path(self.ancestor)).exists():
            return self.arch  # counts can be given before it is there
        return Arch.model_validate(read_manifest(find_artifact(self.ancestor))["arch"])


def run(config: CondenseConfig) -> Path:
    """Train the learngene; returns its folder. Raises `ResumeLater` when stopped early."""
    method, arch = build(config.method), config.trained_arch
    ancestor, about = ancestor_of(config)

    def make(world: World) -> Plan:
        import torch

        generator = torch.Generator().manual_seed(config.seed)
        condensation = method.condense(arch, ancestor, generator)
        source = {"path": config.ancestor, "hash": about.get("hash"), "licence": config.ancestor_licence}
        weights = config.weights
        return Plan(
            condensation,
            arch=arch,
            method=method,
            identity={"ancestor": about.get("hash"), "loss": vars(weights)},
            about={"ancestor": source if ancestor else None},
            weights=weights,
            teacher=ancestor if config.imitates else None,
        )

    return train_stage(config, "condense", "learngene", make)


def ancestor_of(config: CondenseConfig) -> tuple[DiT | None, dict[str, Any]]:
    """The ancestor and what is known of it, when the method or the loss uses one; `ConfigError` when they disagree."""
    method = build(config.method)
    traits = method.traits
    if not traits.condenses:
        raise ConfigError(f"method.name: {config.method.name} has no stage 1; train it directly with fine_dist.train")
    if not config.ancestor:
        if traits.ancestor == "must" or config.imitates:
            why = "distillation imitates" if config.imitates else f"method {config.method.name} as set begins with"
            raise ConfigError(f"ancestor: {why} a trained model; give its folder with --ancestor")
        return None, {}
    if not config.imitates and traits.ancestor != "must":
        raise ConfigError(
            f"ancestor: {config.ancestor} would not be used: method {config.method.name} as set begins with random "
            "weights, and no loss imitates it; leave ancestor out, or set --loss.output 1 (distillation)"
            + (", or --method.initial decompose" if "initial" in type(config.method).model_fields else "")
        )
    ancestor, about = load_model(config.ancestor)
    if traits.same_shape and ancestor.arch != config.trained_arch:
        raise ConfigError(f"ancestor: {config.ancestor} is {ancestor.arch}, and arch says {config.trained_arch}")
    check_teacher(ancestor.arch, config.arch, config.ancestor)
    return ancestor, about
