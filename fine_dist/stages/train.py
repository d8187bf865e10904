"""Stage 3: train an ordinary dense DiT from what a parent gives, or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.locate import exists_locally, find_artifact, is_foreign, is_hub_name
from fine_dist.artifacts.model_facts import check_parent_process, diffusion_of
from fine_dist.artifacts.reading import facts_of, hash_of, inherited_facts, read_artifact
from fine_dist.artifacts.targets import descend
from fine_dist.core.errors import ConfigError
from fine_dist.data.stream import read_all
from fine_dist.engine.world import World
from fine_dist.methods import SCRATCH, build, from_manifest, parent_of
from fine_dist.methods.base import Condensation, Method, MethodConfig, Weights
from fine_dist.model.arch import Arch
from fine_dist.model.arch import arch as named
from fine_dist.model.artifact import read_manifest
from fine_dist.model.dit import DiT
from fine_dist.model.roles import of_role
from fine_dist.stages.blueprint import Blueprint, Stage, check_labels
from fine_dist.stages.build import Plan, check_teacher, weights_of
from fine_dist.stages.checking import check_stage
from fine_dist.stages.settings import TrainConfig
from fine_dist.stages.stage import train_stage


class TrainStage(Stage[TrainConfig]):
    """Stage 3 with its settings."""

    kind = "train"
    product = "model"

    def configured_arch(self, config: TrainConfig) -> Arch | None:
        return config.arch

    @property
    def weights(self) -> Weights:
        """Weights of the loss's terms."""
        return weights_of(self.config.loss, Weights(output=1.0 if self.config.ancestor else 0.0))

    def origin(self) -> dict[str, Any]:
        config, arch = self.config, self.config.arch
        if arch is None and config.parent:
            arch = facts_of(config.parent, config.hints).arch
        return {
            "arch": arch.model_dump() if arch else None,
            "method": config.method.model_dump(mode="json") if config.method else None,
            "origin": hash_of(config.parent, config.hints) if config.parent else None,
            **({} if config.shell == "inherited" else {"shell": config.shell}),
            **({} if not config.loss.repa else {"repa": config.loss.repa_identity()}),
            **({"ancestor": hash_of(config.ancestor, config.hints)} if config.ancestor else {}),
            **({"loss": vars(self.weights)} if self.weights != Weights() else {}),
        }

    def blueprint(self) -> Blueprint | None:
        """A dense DiT, or the product of the parent's method where that is none."""
        config, arch, parent = self.config, self.config.arch, self.config.parent
        if arch is None and parent and (exists_locally(parent) or is_hub_name(parent)):
            arch = facts_of(parent, config.hints).arch
        if parent and exists_locally(parent) and not is_foreign(parent) and config.method is None:
            method = from_manifest(read_manifest(find_artifact(parent))["method"])
            if not method.traits.dense:
                model, _ = load_model(parent, config.learngene)  # what it is made of, its tensors alone tell
                return Blueprint(model.arch, model.requires_grad_(True).to("meta"), method)
        if arch is None:
            return None
        with torch.device("meta"):
            return Blueprint(arch, DiT(arch), build(config.method or SCRATCH), self._teacher_arch(arch))

    def of_shape(self, name: str) -> TrainStage:
        """The same stage of a model of a named shape."""
        return TrainStage(self.config.model_copy(update={"arch": named(name)}))

    def _teacher_arch(self, arch: Arch) -> Arch | None:
        config = self.config
        if not (config.ancestor and self.imitates):
            return None
        known = exists_locally(config.ancestor) or is_foreign(config.ancestor)
        return facts_of(config.ancestor, config.hints).arch if known else arch  # counts can be given before it is there


def check(config: TrainConfig) -> None:
    """Raise what `run` would refuse before its first step; a parent that is not on this machine is not read."""
    stage = TrainStage(config)
    if config.parent and exists_locally(config.parent):
        shape = initial_model(stage.config)[0].arch
        assert isinstance(shape, Arch)
        check_stage(stage, shape)
        return
    check_stage(stage, stage.config.arch)


def initial_model(config: TrainConfig) -> tuple[nn.Module, Method[MethodConfig], dict[str, Any]]:
    """The model before training, the method it comes from, and what its manifest says of what it comes from."""
    if config.method is None and config.parent:
        model, metadata = load_model(config.parent, config.learngene, hints=config.hints)
        check_parent_process(diffusion_of(metadata), config.diffusion, config.parent)
        _check_labels(config, metadata.get("class_names") or (), model.arch.num_classes)
        if config.arch is not None and model.arch != config.arch:
            raise ConfigError(
                f"arch: {config.parent} is {model.arch}, and the config says {config.arch}; leave arch out, or name "
                "the method that makes a target of another shape"
            )
        return model.requires_grad_(True), from_manifest(metadata["method"]), _origin(metadata["hash"], metadata)
    parent = parent_of(read_artifact(config.parent, config.hints)) if config.parent else None
    arch = config.arch or (parent.arch if parent else None)
    if arch is None:
        raise ConfigError("arch: give an architecture (such as DiT-B/2-L6), or a parent to take it from")
    method = build(config.method or SCRATCH)
    if parent is not None and config.parent and method.traits.parents != ("none",):
        check_parent_process(diffusion_of(parent.artifact.extra), config.diffusion, config.parent)
        if arch.num_classes == parent.arch.num_classes:
            _check_labels(config, parent.artifact.extra.get("class_names") or (), arch.num_classes)
    if parent is not None and method.traits.samples and config.data.shards:
        parent = replace(parent, samples=read_all(config.data.shards, method.traits.samples))
    descent = descend(method, parent, arch, config.seed)
    if descent.trains != "nothing":
        raise ConfigError(
            f"method.name: a {method.config.name} target is made by fine_dist.init; give its folder as parent"
        )
    if parent is None or method.traits.parents == ("none",):
        return descent.model, method, _origin(parent.artifact.hash if parent else None, {})
    return descent.model, method, _origin(parent.artifact.hash, parent.artifact.extra)


def _check_labels(config: TrainConfig, names: Sequence[str], num_classes: int) -> None:
    check_labels(
        names,
        num_classes,
        str(config.parent),
        config.data,
        keep_labels=config.keep_labels or config.shell == "scratch",
        remedy="set --shell scratch to train a label embedder anew, or --keep-labels to use the labels as they are",
    )


def _origin(sha256: str | None, extra: dict[str, Any]) -> dict[str, Any]:
    """hash, licence, and the first ancestor, such as weights of another project."""
    ancestor = extra.get("ancestor")
    if imported := extra.get("imported"):
        licence = extra.get("licence")
        ancestor = {"path": imported["source"], "hash": sha256, "licence": licence, "imported": imported}
    return {"origin": sha256, **inherited_facts(extra), **({"ancestor": ancestor} if ancestor else {})}


def with_fresh_shell(model: nn.Module, seed: int) -> None:
    """What is outside the blocks as a model of this shape has it from scratch; the blocks stay as they are."""
    arch: Any = model.arch
    fresh = of_role(DiT(arch, generator=torch.Generator().manual_seed(seed)), "shell")
    for name, tensor in of_role(model, "shell").items():
        tensor.copy_(fresh[name])


def run(config: TrainConfig) -> Path:
    """Train the model; returns its folder. Raises `ResumeLater` when stopped early."""
    stage = TrainStage(config)
    config = stage.config
    if stage.imitates and not config.ancestor:
        raise ConfigError("loss: distillation imitates an ancestor; give its folder with --ancestor")
    if config.ancestor and not stage.imitates:
        raise ConfigError(
            f"ancestor: {config.ancestor} would be ignored: loss.output is 0. Leave one of them out to imitate it."
        )
    ancestor, metadata = load_model(config.ancestor, hints=config.hints) if config.ancestor else (None, {})

    def make(world: World) -> Plan:
        model, method, origin = initial_model(config)
        if config.shell == "scratch":
            with_fresh_shell(model, config.seed)
        arch: Any = model.arch
        if ancestor is not None:
            check_teacher(ancestor.arch, arch, str(config.ancestor))
            check_parent_process(diffusion_of(metadata), config.diffusion, str(config.ancestor), teacher=True)
            origin = {"taught_by": {"path": config.ancestor, "hash": metadata["hash"]}, **origin}
        return Plan(
            Condensation(model, before_step=method.before_step(model)),
            arch=arch,
            method=method,
            metadata={"parent": config.parent, **origin},
            weights=stage.weights,
            draws=False,
            teacher=ancestor,
            teacher_process=diffusion_of(metadata),
        )

    return train_stage(stage, make)
