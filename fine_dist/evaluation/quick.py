"""A quick evaluation while a model trains: a few samples of its EMA, scored every so many steps, on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.artifacts.model_facts import ModelFacts
from fine_dist.core.errors import ConfigError
from fine_dist.evaluation.evaluator import HELD_OUT, networks_of, wanted_of
from fine_dist.evaluation.references import References
from fine_dist.sampling.renderer import ImageRenderer
from fine_dist.sampling.settings import EvaluateConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fine_dist.artifacts.autoencoder import Decoder
    from fine_dist.data.shards import Manifest
    from fine_dist.engine.dist import World
    from fine_dist.stages.config import StageConfig

Measure = Callable[["nn.Module"], dict[str, float]]
Hook = Callable[[int, "torch.Generator"], None]


class Quick:
    """`quick(model) -> scores` when they are due, else nothing. All processes make one: they measure the real images
    together; rank 0 alone scores, because it alone has the averaged weights.

    `step` is what `before_step` has seen last: the model at hand has one update more.
    """

    def __init__(self, config: StageConfig, manifest: Manifest, world: World) -> None:
        self.config, self.manifest = config, manifest
        self.every, self.step, self.done = config.quick.every, -1, 0
        asked = EvaluateConfig(
            metrics=config.quick.metrics,
            samples=config.quick.samples,
            reference=config.quick.reference,
            features=config.quick.features,
            data=config.data,
            vae=config.vae,
        )
        if HELD_OUT in asked.metrics:
            raise ConfigError("quick.metrics: the held-out loss is measured every engine.eval_every steps anyway")
        if not asked.metrics and not asked.features.classifier:
            raise ConfigError("quick.metrics: say what is measured, such as fid, and its weights under quick.features")
        without = asked.model_copy(update={"data": config.data.model_copy(update={"held_out": None})})
        self.networks = networks_of(wanted_of(without), asked.features)
        self.references = References(without, self.networks, world)
        for name in self.networks:
            self.references.statistics(name)

    def before_step(self, then: Hook | None) -> Hook:
        """The hook of a program, which also tells the step."""

        def hook(step: int, generator: torch.Generator) -> None:
            self.step = step
            if then is not None:
                then(step, generator)

        return hook

    def due(self) -> bool:
        """Whether so many steps have passed since the last time, or training ends; once a step."""
        step = self.step + 1
        return step > self.done and (step // self.every > self.done // self.every or step == self.config.steps)

    def __call__(self, model: nn.Module, decoder: Decoder | None) -> dict[str, float]:
        """Scores by `quick_METRIC`."""
        import torch

        from fine_dist.evaluation.collect import Collector
        from fine_dist.evaluation.comparison import compare

        if not self.due():
            return {}
        self.done = self.step + 1
        renderer = preview_renderer(self.config, model, self.manifest, decoder)
        count = self.config.quick.samples
        labels = torch.arange(count) % renderer.model.arch.num_classes
        collectors = {name: Collector(self.references.network(name), count) for name in self.networks}
        for drawn, images in renderer.render(labels, torch.arange(count), self.config.seed, False):
            for collector in collectors.values():
                collector.add(drawn.indices, images)
        found: dict[str, float] = {}
        for name, metrics in self.networks.items():
            for score in compare(collectors[name].result(), self.references.statistics(name), metrics):
                if score.value is not None:
                    found[f"quick_{score.metric}"] = float(score.value)
        return found


def preview_renderer(config: StageConfig, model: Any, manifest: Manifest, decoder: Decoder | None) -> ImageRenderer:
    """A model in training as one that draws, with the stage's own settings."""
    facts = ModelFacts(codec=manifest.codec, class_names=manifest.class_names)
    pictures = decoder is not None or facts.pictures(manifest.latent_shape[0])
    where = Path(config.run_dir).name
    return ImageRenderer(model, where, {}, facts, config.sampler, config.diffusion, decoder, pictures)


def decoder_of(config: StageConfig, manifest: Manifest, world: World) -> Decoder | None:
    """What decodes the stage's pictures, on rank 0; none where nothing was given, or latents are pictures."""
    if not config.vae:
        return None
    if manifest.codec == "identity":
        raise ConfigError("vae: the shards hold pictures, not latents; leave it out")
    if not world.is_main:
        return None
    from fine_dist.artifacts.autoencoder import Decoder

    return Decoder(config.vae, scaling_factor=manifest.scaling_factor, device=world.device or "cpu")
