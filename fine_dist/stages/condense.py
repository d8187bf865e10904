"""Stage 1: train a learngene of an architecture, from random genes or from an ancestor's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.locate import exists_locally, is_hub_name
from fine_dist.artifacts.model_facts import check_parent_process, diffusion_of
from fine_dist.artifacts.reading import facts_of, hash_of, inherited_facts, licence_of
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.engine.world import World
from fine_dist.methods import build
from fine_dist.methods.base import Method, MethodConfig, Weights
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.stages.blueprint import Blueprint, Stage, check_labels
from fine_dist.stages.build import Plan, check_teacher, weights_of
from fine_dist.stages.carry_over import start_from_ancestor
from fine_dist.stages.checking import check_stage
from fine_dist.stages.settings import CondenseConfig
from fine_dist.stages.stage import train_stage


class CondenseStage(Stage[CondenseConfig]):
    """Stage 1 with its settings."""

    kind = "condense"
    product = "learngene"

    def configured_arch(self, config: CondenseConfig) -> Arch | None:
        return config.arch or (None if config.ancestor else Arch())

    @property
    def resolved_method(self) -> Method[MethodConfig]:
        """The method, with settings filled in that depend on the ancestor; one that is not there yet is supposed to
        have the shape of stage 1."""
        config, method = self.config, build(self.config.method)
        if not config.ancestor or not method.traits.condenses:
            return method.given(None, method.auxiliary(config.arch or Arch()))
        if not self.knows_ancestor:
            shape = method.auxiliary(config.arch or Arch())
            return method.given(shape, shape)
        return method.given(facts_of(config.ancestor, config.hints).arch, self.shape)

    @property
    def weights(self) -> Weights:
        """Weights of the loss's terms: the user's, else the method's own. An ancestor that a method could do without is
        given to be imitated, so the weight of its output is then 1."""
        traits = self.resolved_method.traits
        defaults = replace(traits.loss, output=1.0) if self.config.ancestor and not traits.loss.output else traits.loss
        return weights_of(self.config.loss, defaults)

    @property
    def shape(self) -> Arch:
        """Shape of the model that is trained and kept: `arch`, or else the ancestor's, in the method's own depth if it
        sets one. `ArtifactError` when neither can be known."""
        config = self.config
        arch = config.arch or (facts_of(config.ancestor, config.hints).arch if config.ancestor else Arch())
        return build(config.method).auxiliary(arch)

    @property
    def knows_ancestor(self) -> bool:
        """Whether the ancestor can be read now: it is here, or on the hub."""
        ancestor = self.config.ancestor
        return bool(ancestor and (exists_locally(ancestor) or is_hub_name(ancestor)))

    @property
    def knows_shape(self) -> bool:
        """False while the ancestor that it is to be taken from is not there."""
        return bool(self.config.arch or not self.config.ancestor or self.knows_ancestor)

    def origin(self) -> dict[str, Any]:
        config = self.config
        return {
            "arch": self.shape.model_dump(),
            "method": self.resolved_method.config.model_dump(mode="json"),
            "ancestor": hash_of(config.ancestor, config.hints) if config.ancestor else None,
            "loss": vars(self.weights),
            **({} if config.shell == "inherited" else {"shell": config.shell}),
            **({} if not config.loss.repa else {"repa": config.loss.repa_identity()}),
        }

    def blueprint(self) -> Blueprint:
        method = self.resolved_method
        shape = self.shape if self.knows_shape else method.auxiliary(Arch())
        with torch.device("meta"):
            module = method.blueprint(shape)
        return Blueprint(shape, module, method, self._teacher_arch())

    def _teacher_arch(self) -> Arch | None:
        config = self.config
        if not (config.ancestor and self.imitates):
            return None
        if not exists_locally(config.ancestor) and (config.arch or not self.knows_shape):
            return config.arch or Arch()  # counts can be given before it is there
        return facts_of(config.ancestor, config.hints).arch


def check(config: CondenseConfig) -> None:
    """Raise what `run` would refuse before its first step; an ancestor that is not on this machine is not read."""
    stage = CondenseStage(config)
    is_local = not config.ancestor or exists_locally(config.ancestor)
    if is_local:
        ancestor_of(stage)
    check_stage(stage, stage.shape if is_local else stage.config.arch)


def run(config: CondenseConfig) -> Path:
    """Train the learngene; returns its folder. Raises `ResumeLater` when stopped early."""
    stage = CondenseStage(config)
    config = stage.config
    ancestor, metadata = ancestor_of(stage)
    method, shape = stage.resolved_method, stage.shape

    def make(world: World) -> Plan:
        condensation = method.condense(shape, ancestor, torch.Generator().manual_seed(config.seed))
        if ancestor is not None:
            run_dir = Path(expand_path(config.run_dir))
            start_from_ancestor(
                ancestor, condensation, method, run_dir, config.seed, config.shell == "inherited", world
            )
        return Plan(
            condensation,
            arch=shape,
            method=method,
            metadata=ancestor_metadata(config, metadata) if ancestor else {"ancestor": None},
            weights=stage.weights,
            teacher=ancestor if stage.imitates else None,
            teacher_process=diffusion_of(metadata),
        )

    return train_stage(stage, make)


def ancestor_of(stage: CondenseStage) -> tuple[DiT | None, dict[str, Any]]:
    """The ancestor and what is known of it, when the method or the loss uses one; `ConfigError` when they disagree."""
    config = stage.config
    traits = build(config.method).traits
    if not traits.condenses:
        raise ConfigError(f"method.name: {config.method.name} has no stage 1; train it directly with fine_dist.train")
    if not config.ancestor:
        if traits.ancestor == "must" or stage.imitates:
            why = "distillation imitates" if stage.imitates else f"method {config.method.name} as set begins with"
            raise ConfigError(f"ancestor: {why} a trained model; give its folder with --ancestor")
        return None, {}
    traits = stage.resolved_method.traits
    if not stage.imitates and not traits.carries_over and config.shell == "scratch":
        raise ConfigError(
            f"ancestor: {config.ancestor} would be ignored: nothing of it is copied (shell: scratch), method "
            f"{config.method.name} as set starts from random weights, and no term of the loss imitates it. Set "
            "--loss.output 1 to distill from it, or leave --ancestor out."
        )
    ancestor, metadata = load_model(config.ancestor, hints=config.hints)
    shape = stage.shape
    if traits.same_shape and ancestor.arch != shape:
        raise ConfigError(
            f"ancestor: {config.ancestor} is {ancestor.arch}, and arch says {shape}; leave arch out, and it is the "
            "ancestor's"
        )
    check_teacher(ancestor.arch, shape, config.ancestor)
    check_labels(
        metadata.get("class_names") or (),
        ancestor.arch.num_classes,
        config.ancestor,
        config.data,
        keep_labels=config.keep_labels,
        remedy="give data of the ancestor's classes, or --keep-labels to use the labels as they are",
    )
    check_parent_process(diffusion_of(metadata), config.diffusion, config.ancestor, teacher=not traits.carries_over)
    return ancestor, metadata


def ancestor_metadata(config: CondenseConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    """What the learngene's manifest says of its ancestor, the licence of whose weights is its own."""
    licence = config.ancestor_licence or licence_of(metadata)
    source: dict[str, Any] = {"path": config.ancestor, "hash": metadata["hash"], "licence": licence}
    if "imported" in metadata:
        source["imported"] = metadata["imported"]
    return {**inherited_facts(metadata), "licence": licence, "ancestor": source}
