"""Stage 1: train a learngene of an architecture, from random genes or from an ancestor's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.locate import exists_locally, facts_of, hash_of, inherited_facts, is_hub_name, licence_of
from fine_dist.artifacts.model_facts import check_parent_process, diffusion_of
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.config import PathKey, expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.methods import CONDENSES, AnyMethod, build
from fine_dist.methods.base import Method, Weights
from fine_dist.model.arch import Arch
from fine_dist.stages.build import Plan, check_teacher, weights_of
from fine_dist.stages.config import Blueprint, LossConfig, StageConfig, check_labels, fit_arch
from fine_dist.stages.stage import train_stage

if TYPE_CHECKING:
    from fine_dist.engine.dist import World
    from fine_dist.model.dit import DiT


class CondenseConfig(StageConfig):
    """Stage 1: train a learngene, from a trained ancestor or from random factors."""

    run_dir: PathKey = "runs/condense"
    """Folder of this run: logs, checkpoints and, at the end, the learngene in its `learngene/`. The same command again
    resumes the run."""
    arch: Arch | None = None
    """Shape of the model that stage 1 trains. Its depth is ignored where the method has a setting for the depth.
    Default: the ancestor's shape, or DiT-B/2 without an ancestor."""
    method: AnyMethod = CONDENSES
    """How layers share weights."""
    ancestor: PathKey | None = None
    """Trained model that stage 1 starts from and imitates: a folder or run directory of ours, DiT's `.pt`, a folder of
    diffusers, or a name on the hub. Default: none; factors start at random and need a stage 1 as long as a whole
    pre-training."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """Start of what lies outside the blocks (embedders, final layer): `inherited` copies the ancestor's where shapes
    agree, `scratch` draws them at random, as some papers do."""
    hints: HintsConfig = HintsConfig()
    """What another project's file does not say of itself."""
    ancestor_licence: str | None = None
    """License of the ancestor's weights, kept in the learngene's manifest. Default: the one that it states."""
    loss: LossConfig = LossConfig()
    """Weights of the terms of the loss."""

    @property
    def settled(self) -> Method[Any]:
        """The method, with settings filled in that depend on the ancestor; one that is not there yet is supposed to
        have the shape of stage 1."""
        method = build(self.method)
        if not self.ancestor or not method.traits.condenses:
            return method.given(None, method.auxiliary(self.arch or Arch()))
        if not self.knows_ancestor:
            shape = method.auxiliary(self.arch or Arch())
            return method.given(shape, shape)
        return method.given(facts_of(self.ancestor, self.hints).arch, self.shape)

    @property
    def weights(self) -> Weights:
        """Weights of the loss's terms: the user's, else the method's own. An ancestor that a method could do without is
        given to be imitated, so the weight of its output is then 1."""
        traits = self.settled.traits
        own = replace(traits.loss, output=1.0) if self.ancestor and not traits.loss.output else traits.loss
        return weights_of(self.loss, own)

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
    def knows_ancestor(self) -> bool:
        """Whether the ancestor can be read now: it is here, or on the hub."""
        return bool(self.ancestor and (exists_locally(self.ancestor) or is_hub_name(self.ancestor)))

    @property
    def knows_shape(self) -> bool:
        """False while the ancestor that it is to be taken from is not there."""
        return bool(self.arch or not self.ancestor or self.knows_ancestor)

    def fitted(self) -> CondenseConfig:
        """With what `arch` leaves open taken from the shards; without an ancestor that is an architecture's default."""
        arch = self.arch or (None if self.ancestor else Arch())
        return self.model_copy(update={"arch": fit_arch(arch, self.data)}) if arch else self

    def origin(self) -> dict[str, Any]:
        return {
            "arch": self.shape.model_dump(),
            "method": self.settled.config.model_dump(mode="json"),
            "ancestor": hash_of(self.ancestor, self.hints) if self.ancestor else None,
            "loss": vars(self.weights),
            **({} if self.shell == "inherited" else {"shell": self.shell}),
            **({} if not self.loss.repa else {"repa": self.loss.repa_identity()}),
        }

    def blueprint(self) -> Blueprint:
        import torch

        method = self.settled
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
    config = config.fitted()
    ancestor, about = ancestor_of(config)
    method, shape = config.settled, config.shape

    def make(world: World) -> Plan:
        import torch

        from fine_dist.stages.carry_over import begin_from

        condensation = method.condense(shape, ancestor, torch.Generator().manual_seed(config.seed))
        if ancestor is not None:
            run_dir = Path(expand_path(config.run_dir))
            begin_from(ancestor, condensation, method, run_dir, config.seed, config.shell == "inherited", world)
        return Plan(
            condensation,
            arch=shape,
            method=method,
            about=handed_on(config, about) if ancestor else {"ancestor": None},
            weights=config.weights,
            teacher=ancestor if config.imitates else None,
            teacher_process=diffusion_of(about),
        )

    return train_stage(config, "condense", "learngene", make)


def ancestor_of(config: CondenseConfig) -> tuple[DiT | None, dict[str, Any]]:
    """The ancestor and what is known of it, when the method or the loss uses one; `ConfigError` when they disagree."""
    traits = build(config.method).traits
    if not traits.condenses:
        raise ConfigError(f"method.name: {config.method.name} has no stage 1; train it directly with fine_dist.train")
    if not config.ancestor:
        if traits.ancestor == "must" or config.imitates:
            why = "distillation imitates" if config.imitates else f"method {config.method.name} as set begins with"
            raise ConfigError(f"ancestor: {why} a trained model; give its folder with --ancestor")
        return None, {}
    traits = config.settled.traits
    if not config.imitates and not traits.carries_over and config.shell == "scratch":
        raise ConfigError(
            f"ancestor: {config.ancestor} would be ignored: nothing of it is copied (shell: scratch), method "
            f"{config.method.name} as set starts from random weights, and no term of the loss imitates it. Set "
            "--loss.output 1 to distill from it, or leave --ancestor out."
        )
    ancestor, about = load_model(config.ancestor, hints=config.hints)
    shape = config.shape
    if traits.same_shape and ancestor.arch != shape:
        raise ConfigError(
            f"ancestor: {config.ancestor} is {ancestor.arch}, and arch says {shape}; leave arch out, and it is the "
            "ancestor's"
        )
    check_teacher(ancestor.arch, shape, config.ancestor)
    check_labels(
        about.get("class_names") or (),
        ancestor.arch.num_classes,
        config.ancestor,
        config.data,
        kept=config.keep_labels,
        remedy="give data of the ancestor's classes, or --keep-labels to use the labels as they are",
    )
    check_parent_process(diffusion_of(about), config.diffusion, config.ancestor, teacher=not traits.carries_over)
    return ancestor, about


def handed_on(config: CondenseConfig, about: dict[str, Any]) -> dict[str, Any]:
    """What the learngene's manifest says of its ancestor, the licence of whose weights is its own."""
    licence = config.ancestor_licence or licence_of(about)
    source: dict[str, Any] = {"path": config.ancestor, "hash": about["hash"], "licence": licence}
    if "imported" in about:
        source["imported"] = about["imported"]
    return {**inherited_facts(about), "licence": licence, "ancestor": source}
