"""Builds the program that the engine runs from a stage's settings: its loss, its data stream, its callbacks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.data.manifest import check_classes
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import locate
from fine_dist.data.stream import LatentStream, check_fit
from fine_dist.diffusion.objective import (
    DiffusionLoss,
    FeatureDistillation,
    LossTerm,
    Objective,
    OutputDistillation,
    Teacher,
)
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.program import Program
from fine_dist.engine.world import World
from fine_dist.evaluation.training_scores import QuickEvaluation, decoder_of, held_out_evaluator, training_renderer
from fine_dist.methods.base import Condensation, Method, MethodConfig, Weights
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.model.flops import forward_macs, model_cost, train_flops
from fine_dist.sampling.renderer import ImageRenderer
from fine_dist.stages.previews import PreviewCallback, histograms_of
from fine_dist.stages.settings import LossConfig, StageConfig


@dataclass
class Plan:
    """What a stage trains, as every rank builds it alike."""

    condensation: Condensation
    """The module, and what happens before a step."""
    arch: Arch
    """Shape of what is kept."""
    method: Method[MethodConfig]
    metadata: dict[str, Any] = field(default_factory=dict)
    """What else is worth keeping in the manifest (JSON)."""
    weights: Weights = Weights()
    """Of the terms of the loss."""
    draws: bool = True
    """Whether the method's tables over depth are shown: of what it trains itself, not of an ordinary model."""
    terms: tuple[LossTerm, ...] = ()
    """Further terms of the loss, beside those of `weights`."""
    extra_flops: float = 0.0
    """FLOPs of a sample's step for what they compute."""
    reads_tokens: bool = False
    """Whether a term needs the image encoder's tokens that the shards hold."""
    teacher: DiT | None = None
    """Frozen, whatever its depth and width; asked at every step where a term wants it."""
    teacher_process: DiffusionConfig | None = None
    """The process that the teacher was trained for, whose predictions are converted to the run's; None: the run's."""

    def training_flops(self, batch: int) -> float:
        """FLOPs of one sample's step: forward and backward pass as things train, and a teacher's forward pass."""
        module = self.condensation.module
        # an ordinary DiT, whichever method it once came from, costs what ordinary DiTs cost
        # REPA wraps the model; its projector is counted in extra_flops, so here the model inside counts alone.
        module = getattr(module, "student", module) if self.terms else module
        cost = model_cost(module, batch) if type(module) is DiT else self.method.cost(module, batch)
        return (
            cost.training
            + self.extra_flops
            + (2.0 * forward_macs(self.teacher.arch) if self.teacher is not None else 0.0)
        )


def make_program(config: StageConfig, plan: Plan, world: World, identity: dict[str, Any]) -> Program:
    """What the engine trains, and how it is looked at."""
    if config.data.shards is None:
        raise ConfigError("data.shards is not set: give the folder that `fine-dist encode` wrote")
    stream = LatentStream(
        config.data,
        seed=config.seed,
        global_batch=config.batch,
        rank=world.rank,
        world_size=world.world_size,
        expect=plan.arch,
        tokens=plan.reads_tokens,
    )
    product = plan.condensation.product
    decoder = decoder_of(config.vae, stream.manifest, world)

    def renderer(model: nn.Module) -> ImageRenderer:
        """What is kept of a (copy of the) trained module, as one that draws."""
        return training_renderer(
            product(model), config.run_dir, stream.manifest, decoder, config.sampler, config.diffusion
        )

    quick = None
    if config.quick.every:
        quick = QuickEvaluation(
            config.quick,
            data=config.data,
            vae=config.vae,
            sampler=config.sampler,
            diffusion=config.diffusion,
            run_dir=config.run_dir,
            steps=config.steps,
            seed=config.seed,
            world=world,
        )
    evaluator = None
    if config.data.held_out:
        check_held_out(config.data, plan.arch)
        evaluator = held_out_evaluator(config.data, world)

    def scores(model: nn.Module) -> dict[str, float]:
        """Numbers of the averaged weights, by metric; on rank 0."""
        numbers = {}
        if evaluator is not None:
            numbers["held_out_loss"] = evaluator.held_out_loss(product(model), config.diffusion, alone=True)
        return {**numbers, **(quick(renderer(model)) if quick is not None else {})}

    previewed = plan.method if plan.draws else None
    preview = PreviewCallback(previewed, config.seed)
    histograms = histograms_of(previewed)
    objective = Objective(config.diffusion, plan.arch, config.seed, make_terms(config, plan, world))
    return Program(
        model=plan.condensation.module,
        objective=objective,
        term_names=objective.term_names,
        take_terms=objective.take_terms if objective.term_names else None,
        stream=stream,
        identity=identity,
        # The numbers are for the log, which rank 0 writes; the others wait at the next reduction.
        held_out=scores if world.is_main and (evaluator or quick) else None,
        previews=lambda model, step, budget: preview(renderer(model), step, budget),
        histograms=lambda model: histograms(product(model)),
        before_step=quick.before_step(plan.condensation.before_step) if quick else plan.condensation.before_step,
        flops_per_sample=train_flops(plan.arch),
        tokens_per_sample=plan.arch.num_tokens,
    )


def check_held_out(data: DataConfig, arch: Arch) -> None:
    """`DataError` unless held-out shards are there, fit the model and have the classes of the training shards."""
    where = expand_path(str(data.held_out))
    manifest, _ = locate(where, data)
    check_fit(manifest, arch, where)
    if data.shards:
        training = expand_path(data.shards)
        check_classes(training, locate(training, data)[0].class_names, where, manifest.class_names)


def make_terms(config: StageConfig, plan: Plan, world: World) -> list[LossTerm]:
    """The terms of the loss whose weight is not 0, with the teacher frozen on this rank's device."""
    weights = plan.weights
    terms: list[LossTerm] = []
    if weights.diffusion:
        terms.append(DiffusionLoss(make_process(config.diffusion).to(world.device or "cpu"), weights.diffusion))
    if weights.output or weights.features:
        if plan.teacher is None:
            raise ConfigError("loss: distillation imitates an ancestor; give its folder with --ancestor")
        pairs = plan.condensation.pairs
        blocks = sorted({int(theirs.rpartition(".")[2]) for _, theirs in pairs}) if weights.features else []
        model = plan.teacher.to(world.device)
        processes = (plan.teacher_process, config.diffusion) if plan.teacher_process else None
        # A frozen model needs no fp32 copy of its weights: nothing is ever added to them.
        teacher = Teacher(model.to(torch.bfloat16) if config.engine.precision == "bf16" else model, blocks, processes)
        if weights.output:
            terms.append(OutputDistillation(teacher, weights.output))
        if weights.features:
            if not pairs:
                raise ConfigError(f"loss.features: method {plan.method.config.name} names no features; use 0")
            terms.append(FeatureDistillation(teacher, pairs, weights.features))
    terms += plan.terms
    if not terms:
        raise ConfigError("loss: every weight is 0, so nothing would be trained; give one that is not")
    return terms


def weights_of(settings: LossConfig, method: Weights) -> Weights:
    """The user's weights over the method's own."""
    pairs = ((f.name, getattr(settings, f.name), getattr(method, f.name)) for f in fields(Weights))
    return Weights(**{name: default if value is None else value for name, value, default in pairs})


def check_teacher(teacher: Arch, student: Arch, where: str) -> None:
    """`ConfigError` unless a teacher's answers can be compared with the student's: latent shape and classes agree."""
    for name in ("in_channels", "input_size", "num_classes"):
        if getattr(teacher, name) != getattr(student, name):
            raise ConfigError(
                f"ancestor: {where} has {name} {getattr(teacher, name)}, and arch says {getattr(student, name)}; an "
                "ancestor may have another depth and width, but the same latents and classes"
            )
