"""Evaluation during training: the held-out loss, and at longer intervals the scores of a few samples of the EMA.

`Evaluator` measures on rank 0, the only rank with the averaged weights; all ranks together measure the statistics of
the real images once before training.
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
    """An evaluator of the held-out loss during training, on at most `data.held_out_samples` samples."""
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
    """A renderer of a model in training with the settings of its run; `manifest` is that of its training shards."""
    facts = ModelFacts(codec=manifest.codec, class_names=manifest.class_names)
    pictures = decoder is not None or facts.pictures(manifest.latent_shape[0])
    return ImageRenderer(model, Path(run_dir).name, {}, facts, sampler, diffusion, decoder, pictures)


def decoder_of(vae: str | None, manifest: Manifest, world: World) -> Decoder | None:
    """The decoder of a training run's samples on rank 0; None on other ranks and without a VAE."""
    if not vae:
        return None
    if manifest.codec == "identity":
        raise ConfigError("vae: the shards hold images, not latents; leave it out")
    if not world.is_main:
        return None
    device = world.device or "cpu"
    return Decoder(vae, scaling_factor=manifest.scale, shift_factor=manifest.shift, device=device)


class QuickEvaluation:
    """Scores of samples of the EMA when they are due: `quick(renderer) -> {metric: value}`, otherwise empty.

    All processes create one, because they measure the real images together; only rank 0 calls it. The scores have the
    names of `evaluate`, and RUN_DIR/evaluate.json records them with their protocol, one row for each step.

    Args:
        config: Interval, number of samples and metrics.
        data: The run's data; `shards` are the real images if there is no reference.
        vae: Autoencoder that decodes samples of latents.
        sampler: The sampler.
        diffusion: The diffusion process of the model.
        run_dir: Folder of evaluate.json.
        steps: Number of steps of the run; the last step is always measured.
        seed: Seed of the samples' noise.
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
        evaluate_config = EvaluateConfig(
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
        self.evaluator = Evaluator(evaluate_config, world)
        # Measured now by all ranks: later only rank 0 makes calls, and it would wait in these collectives forever.
        for name in self.evaluator.networks:
            self.evaluator.references.statistics(name)
        self.protocol = self.evaluator.protocol()
        self.updates, self._measured_at = 0, 0

    def before_step(self, then: BeforeStep | None) -> BeforeStep:
        """A hook for each step that counts steps for this evaluation and then calls `then`."""

        def hook(step: int, generator: torch.Generator) -> None:
            self.updates = step + 1  # of the model that is measured next
            if then is not None:
                then(step, generator)

        return hook

    def is_due(self) -> bool:
        """Whether `every` steps have passed since the last measurement, or training has ended; true once per step."""
        # Not `updates % every`: a resumed run, or one that evaluates at other steps, may never hit a multiple exactly.
        passed = self.updates // self.every > self._measured_at // self.every
        return self.updates > self._measured_at and (passed or self.updates == self.steps)

    def __call__(self, renderer: ImageRenderer) -> dict[str, float]:
        """Scores by metric; empty if they are not due."""
        if not self.is_due():
            return {}
        self._measured_at = self.updates
        measured = self.evaluator.scores(renderer, alone=True)
        arch = getattr(renderer.model, "arch", None)
        row = {"model": renderer.where, "step": self.updates, "arch": arch.name if arch else None, "method": "training"}
        record(Path(expand_path(self.run_dir)), self.protocol, [{**row, **measured.row()}], {})
        return measured.numbers()
