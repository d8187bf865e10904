"""Stage 1: train a learngene of an architecture, from random genes or from an ancestor's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.locate import exists_locally, facts_of, hash_of, inherited_facts, is_foreign, licence_of
from fine_dist.artifacts.model_facts import check_parent_process, diffusion_of
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.errors import ConfigError
from fine_dist.methods import CONDENSES, AnyMethod, build
from fine_dist.methods.base import Weights
from fine_dist.model.arch import Arch
from fine_dist.stages.build import Plan, check_teacher, weights_of
from fine_dist.stages.config import Blueprint, LossConfig, StageConfig
from fine_dist.stages.stage import train_stage

if TYPE_CHECKING:
    from fine_dist.engine.dist import World
    from fine_dist.model.dit import DiT


class CondenseConfig(StageConfig):
    """Stage 1: train a learngene of an ancestor's architecture, from random genes or from an ancestor's weights."""

    run_dir: str = "runs/condense"
    """Where everything is written; the learngene lands in its `learngene/`."""
    arch: Arch | None = None
    """Shape of the model that stage 1 trains, but for its depth where the method has a setting for it; none: the
    ancestor's, or DiT-B/2 without one."""
    method: AnyMethod = CONDENSES
    """How layers share weights."""
    ancestor: str | None = None
    """A trained model, which the method begins with or distillation imitates: a folder or run of ours, DiT's `.pt`, a
    folder of diffusers, or a name on the hub."""
    hints: HintsConfig = HintsConfig()
    """What another project's file does not say of itself."""
    ancestor_licence: str | None = None
    """Licence of the ancestor's weights; kept in the learngene's manifest."""
    loss: LossConfig = LossConfig()
    """Terms of the loss and their weights."""

    @property
    def weights(self) -> Weights:
        """Of the loss's terms: the user's over the method's own."""
        return weights_of(self.loss, build(self.method).traits.loss)

    @property
    def imitates(self) -> bool:
        """Whether a term of the loss imitates the ancestor."""
        return self.weights.output > 0 or self.weights.features > 0

    @property
    def shape(self) -> Arch:
        """Of what is trained and kept: what `arch` says, or else the ancestor's, in the method's own depth if it sets
        one. `ArtifactError` when neither can be known."""
        said = self.arch or (facts_of(self.ancestor, self.hints).arch if self.ancestor else Arch())
        return build(self.method).auxiliary(said)

    @property
    def knows_shape(self) -> bool:
        """False while the ancestor that it is to be taken from is not there."""
        return bool(self.arch or not self.ancestor or exists_locally(self.ancestor) or is_foreign(self.ancestor))

    def origin(self) -> dict[str, Any]:
        return {
            "arch": self.shape.model_dump(),
            "method": self.method.model_dump(mode="json"),
            "ancestor": hash_of(self.ancestor, self.hints) if self.ancestor else None,
            "loss": vars(self.weights),
        }

    def blueprint(self) -> Blueprint:
        import torch

        method = build(self.method)
        shape = self.shape if self.knows_shape else method.auxiliary(Arch())
        with torch.device("meta"):
            module = method.blueprint(shape)
        return Blueprint(shape, module, method, self._teacher_arch())

    def _teacher_arch(self) -> Arch | None:
        if not (self.ancestor and self.imitates):
            return None
        if not exists_locally(self.ancestor) and (self.arch or not self.knows_shape):
            return self.arch or Arch()  # counts can be given before it is there
        return facts_of(self.ancestor, self.hints).arch


def run(config: CondenseConfig) -> Path:
    """Train the learngene; returns its folder. Raises `ResumeLater` when stopped early."""
    method = build(config.method)
    ancestor, about = ancestor_of(config)
    shape = config.shape

    def make(world: World) -> Plan:
        import torch

        generator = torch.Generator().manual_seed(config.seed)
        condensation = method.condense(shape, ancestor, generator)
        weights = config.weights
        return Plan(
            condensation,
            arch=shape,
            method=method,
            about=handed_on(config, about) if ancestor else {"ancestor": None},
            weights=weights,
            teacher=ancestor if config.imitates else None,
            teacher_process=diffusion_of(about),
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
    ancestor, about = load_model(config.ancestor, hints=config.hints)
    shape = config.shape
    if traits.same_shape and ancestor.arch != shape:
        raise ConfigError(
            f"ancestor: {config.ancestor} is {ancestor.arch}, and arch says {shape}; leave arch out, and it is the "
            "ancestor's"
        )
    check_teacher(ancestor.arch, shape, config.ancestor)
    check_parent_process(
        diffusion_of(about), config.diffusion, config.ancestor, teacher=method.traits.ancestor != "must"
    )
    return ancestor, about


def handed_on(config: CondenseConfig, about: dict[str, Any]) -> dict[str, Any]:
    """What the learngene's manifest says of its ancestor, the licence of whose weights is its own."""
    licence = config.ancestor_licence or licence_of(about)
    source: dict[str, Any] = {"path": config.ancestor, "hash": about["hash"], "licence": licence}
    if "imported" in about:
        source["imported"] = about["imported"]
    return {**inherited_facts(about), "licence": licence, "ancestor": source}
