"""Scores while a model trains: the held-out loss, and every so many steps those of a few samples of the EMA.

Everything is measured by `Evaluator`, on rank 0, which alone has the averaged weights; the statistics of the real
images are measured by all ranks together, once, before training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fine_dist.artifacts.autoencoder import Decoder
from fine_dist.artifacts.model_facts import ModelFacts
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.data.manifest import Manifest
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.engine.world import World
from fine_dist.evaluation.comparison import HELD_OUT_LOSS
from fine_dist.evaluation.evaluator import Evaluator
from fine_dist.evaluation.recording import record
from fine_dist.evaluation.settings import EvaluateConfig, QuickConfig
from fine_dist.sampling.renderer import ImageRenderer

BeforeStep = Callable[[int, "torch.Generator"], None]


def held_out_evaluator(data: DataConfig, world: World) -> Evaluator:
    """What measures the held-out loss of a model that trains, on at most `data.held_out_samples` samples."""
    config = EvaluateConfig(metrics=(HELD_OUT_LOSS,), data=data)
    return Evaluator(config, world, data.held_out_samples)


def training_renderer(
    model: Any,
    run_dir: str,
    manifest: Manifest,
    decoder: Decoder | None,
    sampler: SamplerConfig,
    diffusion: DiffusionConfig,
) -> ImageRenderer:
    """A model in training as one that draws, with the settings of its run. manifest: of the shards it trains on."""
    facts = ModelFacts(codec=manifest.codec, class_names=manifest.class_names)
    pictures = decoder is not None or facts.pictures(manifest.latent_shape[0])
    return ImageRenderer(model, Path(run_dir).name, {}, facts, sampler, diffusion, decoder, pictures)


def decoder_of(vae: str | None, manifest: Manifest, world: World) -> Decoder | None:
    """What decodes a training run's pictures, on rank 0; none without a VAE, or where latents are pictures."""
    if not vae:
        return None
    if manifest.codec == "identity":
        raise ConfigError("vae: the shards hold pictures, not latents; leave it out")
    if not world.is_main:
        return None
    device = world.device or "cpu"
    return Decoder(vae, scaling_factor=manifest.scale, shift_factor=manifest.shift, device=device)


class QuickEvaluation:
    """Scores of the EMA's samples, `quick(model) -> {metric: value}`, when they are due; else nothing.

    All processes make one, because they measure the real images together; rank 0 alone calls it. The scores have the
    names that `evaluate` gives them, and RUN_DIR/evaluate.json records them with their protocol, a row a step.

    Args:
        config: How often, how many samples, which metrics.
        data: The run's data; `shards` are the real images without a reference.
        vae: What decodes samples, where they are latents.
        run_dir: Folder of evaluate.json.
        steps: The run's length; the last step is always measured.
        seed: Of the samples' noise.
        world: The run's processes.
    """

    def __init__(
        self,
        config: QuickConfig,
        *,
        data: DataConfig,
        vae: str | None,
        sampler: SamplerConfig,
        diffusion: DiffusionConfig,
        run_dir: str,
        steps: int,
        seed: int,
        world: World,
    ) -> None:
        if HELD_OUT_LOSS in config.metrics:
            raise ConfigError("quick.metrics: the held-out loss is measured every engine.eval_every steps anyway")
        if not config.metrics and not config.features.classifier:
            raise ConfigError("quick.metrics: say what is measured, such as fid, and its weights under quick.features")
        asked = EvaluateConfig(
            metrics=config.metrics,
            samples=config.samples,
            reference=config.reference,
            features=config.features,
            data=data.model_copy(update={"held_out": None}),
            vae=vae,
            sampler=sampler,
            diffusion=diffusion,
            run_dir=run_dir,
            seed=seed,
        )
        self.every, self.steps, self.run_dir, self.world = config.every, steps, run_dir, world
        self.evaluator = Evaluator(asked, world)
        # Now and by all ranks: later calls are rank 0's alone, which would wait in these collectives forever.
        for name in self.evaluator.networks:
            self.evaluator.references.statistics(name)
        self.protocol = self.evaluator.protocol()
        self.updates, self._measured_at = 0, 0

    def before_step(self, then: BeforeStep | None) -> BeforeStep:
        """The hook that a run calls before each step, which also counts this evaluation's steps."""

        def hook(step: int, generator: torch.Generator) -> None:
            self.updates = step + 1  # of the model that is measured next
            if then is not None:
                then(step, generator)

        return hook

    def is_due(self) -> bool:
        """Whether `every` steps have passed since the last time, or training has ended; true once a step."""
        # Not `updates % every`: a run that was resumed, or evaluates at other steps, may never meet a multiple exactly.
        passed = self.updates // self.every > self._measured_at // self.every
        return self.updates > self._measured_at and (passed or self.updates == self.steps)

    def __call__(self, renderer: ImageRenderer) -> dict[str, float]:
        """Scores by metric; empty when they are not due."""
        if not self.is_due():
            return {}
        self._measured_at = self.updates
        measured = self.evaluator.scores(renderer, alone=True)
        arch = getattr(renderer.model, "arch", None)
        row = {"model": renderer.where, "step": self.updates, "arch": arch.name if arch else None, "method": "training"}
        record(Path(expand_path(self.run_dir)), self.protocol, [{**row, **measured.row()}], {})
        return measured.numbers()
