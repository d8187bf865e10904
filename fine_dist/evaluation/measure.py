"""Measuring a model: the held-out noise-prediction loss, and the Fréchet distance of its samples to real data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_dist.core.config import Config, expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.engine.settings import EngineConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fine_dist.evaluation.base import Features
    from fine_dist.evaluation.moments import Moments
    from fine_dist.model.dit import DiT


class MeasureConfig(Config):
    """What is measured, and on what."""

    data: DataConfig = DataConfig()
    """`held_out` for the loss; `shards` are the reference of the Fréchet distance."""
    features: str | None = None
    """Folder of a feature extractor (the demo's digits classifier); none: no Fréchet distance."""
    samples: int = Field(500, ge=2)
    """Images drawn for the Fréchet distance; classes in turn."""
    seed: int = Field(0, ge=0)
    """Seeds the noise of the samples."""
    sampler: SamplerConfig = SamplerConfig()
    """Scheduler, steps, guidance."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The process the models were trained for."""
    engine: EngineConfig = EngineConfig()
    """Device and threads."""


class Measures:
    """The measurements of a config, with what they share read once: `measure(model, title) -> numbers`.

    floor: the Fréchet distance of held-out real images to the reference; none where it is not measured.
    """

    def __init__(self, config: MeasureConfig) -> None:
        from fine_dist.data.stream import read_all
        from fine_dist.diffusion.held_out import HeldOutLoss
        from fine_dist.engine.dist import pick_device

        self.config = config
        self.device = pick_device(config.engine.device)
        held_out = read_all(expand_path(config.data.held_out)) if config.data.held_out else None
        self.held_out = HeldOutLoss(*held_out, config.diffusion) if held_out else None
        self.reference: Moments | None = None
        self.floor: float | None = None
        self._efflite: tuple[Features, Moments] | None = None
        if config.features:
            from fine_dist.evaluation.features import load_classifier
            from fine_dist.evaluation.frechet import frechet_distance

            if not config.data.shards:
                raise ConfigError("data.shards: the Fréchet distance needs real data to compare with")
            self.classifier = load_classifier(expand_path(config.features)).classifier
            self.reference = self.moments(read_all(expand_path(config.data.shards))[0])
            if held_out:
                self.floor = frechet_distance(self.moments(held_out[0]), self.reference)

    def moments(self, images: Tensor) -> Moments:
        """Of the features of images [N, C, H, H]."""
        import torch

        from fine_dist.evaluation.moments import Moments

        with torch.no_grad():
            return Moments.of(self.classifier.features(images))

    def __call__(self, model: DiT, title: str, efflite: bool = False) -> dict[str, Any]:
        """All numbers of a model; none for what is not measured. title: of the progress bar of its samples.

        efflite: with `fd_efflite`, of the same samples. `ConfigError` where there is no real data to compare with.
        """
        loss = self.loss(model) if self.held_out else None
        return {"held_out_loss": loss, "frechet": None} | self.distances(model, title, efflite)

    def distances(self, model: DiT, title: str, efflite: bool = False) -> dict[str, Any]:
        """`frechet`, where there are features, and `fd_efflite`, where it is asked for, of one draw of samples."""
        if not self.reference and not efflite:
            return {}
        drawn = self.draw(model.to(self.device).eval(), self.config.samples, title)
        return {
            **({"frechet": self.frechet(drawn)} if self.reference else {}),
            **({"fd_efflite": self.efflite(drawn)} if efflite else {}),
        }

    def loss(self, model: nn.Module) -> float:
        """The held-out loss of a dense or a composed model. `ConfigError` without held-out data."""
        if self.held_out is None:
            raise ConfigError("data.held_out: the held-out loss needs shards that were never trained on")
        return float(self.held_out(model.to(self.device).eval())["held_out_loss"])

    def frechet(self, images: Tensor) -> float:
        """Of images to the reference, on the classifier's features. `ConfigError` without features."""
        from fine_dist.evaluation.frechet import frechet_distance

        if self.reference is None:
            raise ConfigError("features: the Fréchet distance needs the folder of a feature extractor")
        return frechet_distance(self.moments(images), self.reference)

    def efflite(self, images: Tensor) -> float:
        """Of images to as many real ones, spaced evenly over the data, on EfficientNet-lite0's ImageNet features."""
        from fine_dist.evaluation.frechet import frechet_distance

        if self._efflite is None:
            from fine_dist.data.stream import read_all
            from fine_dist.evaluation.features import load_features

            if not self.config.data.shards:
                raise ConfigError("data.shards: the Fréchet distance needs real data to compare with")
            network = load_features("efflite", None, self.device)
            real = read_all(expand_path(self.config.data.shards))[0]
            some = real[:: max(1, len(real) // len(images))][: len(images)]
            self._efflite = (network, _streamed(network, some, "real images through EfficientNet"))
        network, reference = self._efflite
        return frechet_distance(_streamed(network, images, "samples through EfficientNet"), reference)

    def draw(self, model: DiT, count: int, title: str) -> Tensor:
        """Samples [count, C, H, H], classes in turn; image i is the same for every model of a seed."""
        import torch

        from fine_dist.diffusion.samplers import sample

        return sample(
            model,
            labels=torch.arange(count) % model.arch.num_classes,
            arch=model.arch,
            config=self.config.sampler,
            diffusion=self.config.diffusion,
            seed=self.config.seed,
            progress=f"sample {title}",
        )


def _streamed(network: Features, images: Tensor, title: str, batch: int = 64) -> Moments:
    """The moments of a network's features of images, batch by batch."""
    from tqdm import tqdm

    from fine_dist.evaluation.moments import Moments

    total = Moments.empty(network.num_features)
    for part in tqdm(images.split(batch), desc=title, unit="batch", leave=False):
        total.update(network(part).pooled)
    return total
