"""Stage 3: train an ordinary dense DiT from what a parent gives, or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.locate import (
    exists_locally,
    facts_of,
    find_artifact,
    hash_of,
    inherited_facts,
    is_foreign,
    is_hub_name,
    read_artifact,
)
from fine_dist.artifacts.model_facts import check_parent_process, diffusion_of
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.artifacts.targets import descend
from fine_dist.core.config import PathKey
from fine_dist.core.errors import ConfigError
from fine_dist.methods import SCRATCH, AnyMethod, build, from_manifest, parent_of
from fine_dist.methods.base import Condensation, Method, Weights
from fine_dist.model.arch import Arch
from fine_dist.stages.build import Plan, check_teacher, weights_of
from fine_dist.stages.config import Blueprint, LossConfig, StageConfig, check_labels, fit_arch
from fine_dist.stages.stage import train_stage

if TYPE_CHECKING:
    from torch import nn

    from fine_dist.engine.dist import World


class TrainConfig(StageConfig):
    """Stage 3: train a dense DiT with all its weights free, a fresh optimiser and a fresh EMA."""

    run_dir: PathKey = "runs/train"
    """Where everything is written; the model lands in its `model/`."""
    parent: PathKey | None = None
    """An initialised target, a model or a learngene, of ours or another project's (DiT's `.pt`, a folder of diffusers,
    a name on the hub): trained as it is, or what `method` makes a target of."""
    parents: str | None = None
    """Run directory of a family that `fine-dist init` made. One model is trained from each of its targets, as a fan-out
    with a folder of run_dir for each; none trains one model."""
    hints: HintsConfig = HintsConfig()
    """What another project's file does not say of itself."""
    learngene: PathKey | None = None
    """Where the learngene of an initialised target lies now, when it has moved."""
    arch: Arch | None = None
    """Architecture; none: that of the parent."""
    method: AnyMethod | None = None
    """How the weights begin; none: as in the parent, or from scratch where there is no parent."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """What is outside the blocks (embedders, final layer) begins as the parent or method has it, or from scratch: what
    the blocks alone are worth."""
    ancestor: PathKey | None = None
    """Trained model whose output the model imitates while it trains (distillation): a folder or run directory of ours,
    DiT's `.pt`, a folder of diffusers, or a name on the hub. Default: none, training on the data alone."""
    loss: LossConfig = LossConfig()
    """Weights of the terms of the loss. Default: noise prediction, and the ancestor's output where one is given, with
    weight 1 each."""

    @property
    def weights(self) -> Weights:
        """Weights of the loss's terms."""
        return weights_of(self.loss, Weights(output=1.0 if self.ancestor else 0.0))

    @property
    def imitates(self) -> bool:
        """Whether a term of the loss imitates the ancestor."""
        return self.weights.output > 0 or self.weights.features > 0

    def fitted(self) -> TrainConfig:
        """With what `arch` leaves open taken from the shards."""
        return self.model_copy(update={"arch": fit_arch(self.arch, self.data)}) if self.arch else self

    def origin(self) -> dict[str, Any]:
        arch = self.arch
        if arch is None and self.parent:
            arch = facts_of(self.parent, self.hints).arch
        return {
            "arch": arch.model_dump() if arch else None,
            "method": self.method.model_dump(mode="json") if self.method else None,
            "origin": hash_of(self.parent, self.hints) if self.parent else None,
            **({} if self.shell == "inherited" else {"shell": self.shell}),
            **({} if not self.loss.repa else {"repa": self.loss.repa_identity()}),
            **({"ancestor": hash_of(self.ancestor, self.hints)} if self.ancestor else {}),
            **({"loss": vars(self.weights)} if self.weights != Weights() else {}),
        }

    def blueprint(self) -> Blueprint | None:
        """A dense DiT, or the product of the parent's method where that is none."""
        import torch

        from fine_dist.model.artifact import read_manifest
        from fine_dist.model.dit import DiT

        arch = self.arch
        if arch is None and self.parent and (exists_locally(self.parent) or is_hub_name(self.parent)):
            arch = facts_of(self.parent, self.hints).arch
        if self.parent and exists_locally(self.parent) and not is_foreign(self.parent) and self.method is None:
            made = from_manifest(read_manifest(find_artifact(self.parent))["method"])
            if not made.traits.dense:
                whole, _ = load_model(self.parent, self.learngene)  # what it is made of, its tensors alone tell
                return Blueprint(whole.arch, whole.requires_grad_(True).to("meta"), made)
        if arch is None:
            return None
        with torch.device("meta"):
            return Blueprint(arch, DiT(arch), build(self.method or SCRATCH), self._teacher_arch(arch))

    def _teacher_arch(self, arch: Arch) -> Arch | None:
        if not (self.ancestor and self.imitates):
            return None
        known = exists_locally(self.ancestor) or is_foreign(self.ancestor)
        return facts_of(self.ancestor, self.hints).arch if known else arch  # counts can be given before it is there


def begin(config: TrainConfig) -> tuple[nn.Module, Method[Any], dict[str, Any]]:
    """The model before training, the method it comes from, and what its manifest says of what it comes from."""
    if config.method is None and config.parent:
        model, about = load_model(config.parent, config.learngene, hints=config.hints)
        check_parent_process(diffusion_of(about), config.diffusion, config.parent)
        _check_labels(config, about.get("class_names") or (), model.arch.num_classes)
        if config.arch is not None and model.arch != config.arch:
            raise ConfigError(
                f"arch: {config.parent} is {model.arch}, and the config says {config.arch}; leave arch out, or name "
                "the method that makes a target of another shape"
            )
        return model.requires_grad_(True), from_manifest(about["method"]), _origin(about["hash"], about)
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
        from fine_dist.data.stream import read_all

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
        kept=config.keep_labels or config.shell == "scratch",
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
    import torch

    from fine_dist.model.dit import DiT
    from fine_dist.model.roles import of_role

    arch: Any = model.arch
    fresh = of_role(DiT(arch, generator=torch.Generator().manual_seed(seed)), "shell")
    for name, own in of_role(model, "shell").items():
        own.copy_(fresh[name])


def run(config: TrainConfig) -> Path:
    """Train the model; returns its folder. Raises `ResumeLater` when stopped early."""
    config = config.fitted()
    if config.imitates and not config.ancestor:
        raise ConfigError("loss: distillation imitates an ancestor; give its folder with --ancestor")
    if config.ancestor and not config.imitates:
        raise ConfigError(
            f"ancestor: {config.ancestor} would be ignored: loss.output is 0. Leave one of them out to imitate it."
        )
    ancestor, about = load_model(config.ancestor, hints=config.hints) if config.ancestor else (None, {})

    def make(world: World) -> Plan:
        model, method, origin = begin(config)
        if config.shell == "scratch":
            with_fresh_shell(model, config.seed)
        arch: Any = model.arch
        if ancestor is not None:
            check_teacher(ancestor.arch, arch, str(config.ancestor))
            check_parent_process(diffusion_of(about), config.diffusion, str(config.ancestor), teacher=True)
            origin = {"taught_by": {"path": config.ancestor, "hash": about["hash"]}, **origin}
        return Plan(
            Condensation(model, before_step=method.before_step(model)),
            arch=arch,
            method=method,
            about={"parent": config.parent, **origin},
            weights=config.weights,
            draws=False,
            teacher=ancestor,
            teacher_process=diffusion_of(about),
        )

    return train_stage(config, "train", "model", make)
