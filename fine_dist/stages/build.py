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
    """What a stage trains. Every rank builds the same plan."""

    condensation: Condensation
    """The module to train, and its hook before each step."""
    arch: Arch
    """Architecture of the model that is saved."""
    method: Method[MethodConfig]
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further entries of the manifest (JSON)."""
    weights: Weights = Weights()
    """Weights of the loss terms."""
    draws: bool = True
    """Whether previews include the method's tables over depth; False for an ordinary dense model."""
    terms: tuple[LossTerm, ...] = ()
    """Loss terms besides those of `weights`."""
    extra_flops: float = 0.0
    """FLOPs of these terms for one sample."""
    reads_tokens: bool = False
    """Whether a term needs the image encoder's tokens that the shards hold."""
    teacher: DiT | None = None
    """Frozen model of any depth and width, which runs at every step if a loss term needs it."""
    teacher_process: DiffusionConfig | None = None
    """Process that the teacher was trained for. Its predictions are converted to the run's process. None: the same."""

    def training_flops(self, batch: int) -> float:
        """FLOPs of one sample: the forward and backward pass, and a teacher's forward pass."""
        module = self.condensation.module
        # A dense DiT has the usual cost, whichever method it came from. REPA wraps the model; its projector is counted
        # in `extra_flops`, so that only the inner model counts here.
        module = getattr(module, "student", module) if self.terms else module
        cost = model_cost(module, batch) if type(module) is DiT else self.method.cost(module, batch)
        return (
            cost.training
            + self.extra_flops
            + (2.0 * forward_macs(self.teacher.arch) if self.teacher is not None else 0.0)
        )


def make_program(config: StageConfig, plan: Plan, world: World, identity: dict[str, Any]) -> Program:
    """The engine's program: model, objective, data stream, evaluation and previews."""
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
        """A renderer of the product of a (copy of the) trained module."""
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
        """Scores of the EMA weights by metric, on rank 0."""
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
        # Only rank 0 computes them, because it writes the log; the others wait in the next all-reduce.
        held_out=scores if world.is_main and (evaluator or quick) else None,
        previews=lambda model, step, budget: preview(renderer(model), step, budget),
        histograms=lambda model: histograms(product(model)),
        before_step=quick.before_step(plan.condensation.before_step) if quick else plan.condensation.before_step,
        flops_per_sample=train_flops(plan.arch),
        tokens_per_sample=plan.arch.num_tokens,
    )


def check_held_out(data: DataConfig, arch: Arch) -> None:
    """`DataError` unless the held-out shards exist, fit the model and have the training shards' classes."""
    where = expand_path(str(data.held_out))
    manifest, _ = locate(where, data)
    check_fit(manifest, arch, where)
    if data.shards:
        training = expand_path(data.shards)
        check_classes(training, locate(training, data)[0].class_names, where, manifest.class_names)


def make_terms(config: StageConfig, plan: Plan, world: World) -> list[LossTerm]:
    """The loss terms with a weight above 0; the frozen teacher is moved to this rank's device."""
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
        # A frozen model needs no fp32 master weights.
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
    """The user's weights, with the method's as defaults."""
    pairs = ((f.name, getattr(settings, f.name), getattr(method, f.name)) for f in fields(Weights))
    return Weights(**{name: default if value is None else value for name, value, default in pairs})


def check_teacher(teacher: Arch, student: Arch, where: str) -> None:
    """`ConfigError` unless the teacher's latent shape and number of classes are the student's."""
    for name in ("in_channels", "input_size", "num_classes"):
        if getattr(teacher, name) != getattr(student, name):
            raise ConfigError(
                f"ancestor: {where} has {name} {getattr(teacher, name)}, and arch says {getattr(student, name)}; an "
                "ancestor may have another depth and width, but the same latents and classes"
            )
