"""A model that is ready to draw: with the settings that its manifest and the user agree on, and with its decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fine_dist.artifacts.model_facts import ModelFacts, model_facts_of, resolve_sampling
from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from fine_dist.artifacts.autoencoder import Decoder
    from fine_dist.model.dit import DiT


@dataclass
class ImageRenderer:
    """A model that is ready to draw: its settled settings, and what makes pictures of its latents.

    decoder: none where latents are pictures themselves (`pictures` true), or stay latents.
    notes:   what a user should know of the settings.
    """

    model: DiT
    where: str
    about: dict[str, Any]
    facts: ModelFacts
    sampler: SamplerConfig
    diffusion: DiffusionConfig
    decoder: Decoder | None
    pictures: bool
    notes: list[str] = field(default_factory=list)

    def finish(self, latents: Tensor) -> Tensor:
        """Pictures uint8 [B, C, H, W] of latents. Only where `pictures`."""
        from fine_dist.sampling.image_grid import to_uint8

        return self.decoder.decode(latents) if self.decoder else to_uint8(latents.clamp(-1, 1))

    def render(self, labels: Tensor, numbers: Tensor, seed: int, progress: bool | str) -> Iterator[tuple[Any, Tensor]]:
        """(drawn batch, pictures or latents) of these numbers; a batch is decoded while the next is drawn."""
        from fine_dist.artifacts.autoencoder import decoded
        from fine_dist.diffusion.samplers import sample_batches

        batches = sample_batches(
            self.model,
            labels=labels,
            arch=self.model.arch,
            config=self.sampler,
            diffusion=self.diffusion,
            seed=seed,
            indices=numbers,
            progress=progress,
        )
        if self.decoder is not None:
            yield from decoded(batches, self.decoder)
            return
        for drawn in batches:
            yield drawn, self.finish(drawn.latents) if self.pictures else drawn.latents

    def protocol(self, seed: int) -> dict[str, Any]:
        """What decides an image of a number and a label; JSON."""
        return {
            "model": self.about["hash"],
            "sampler": self.sampler.model_dump(exclude={"batch"}),
            "diffusion": self.diffusion.model_dump(exclude={"label_drop"}),
            "seed": seed,
        }


def make_renderer(config: Any, path: str, device: Any) -> ImageRenderer:
    """A model from any source with its settings: what the config says over what its manifest says.

    config: has weights, learngene, hints, sampler, diffusion, vae, vae_precision.
    """
    from fine_dist.artifacts.autoencoder import Decoder
    from fine_dist.artifacts.load import load_model

    model, about = load_model(path, config.learngene, config.weights, config.hints)
    facts = model_facts_of(about)
    sampler, diffusion, notes = resolve_sampling(config.sampler, config.diffusion, facts, path)
    pictures, decoder = facts.pictures(model.arch.in_channels), None
    if config.vae:
        if facts.codec == "identity":
            raise ConfigError(f"vae: the model of {path} was trained on pictures, not on latents; leave it out")
        decoder = Decoder(
            config.vae, scaling_factor=facts.scaling_factor, device=device, precision=config.vae_precision
        )
        if decoder.channels != model.arch.in_channels:
            raise ConfigError(
                f"vae: {config.vae} decodes latents of {decoder.channels} channels, and the model of {path} makes "
                f"{model.arch.in_channels}"
            )
        pictures = True
    return ImageRenderer(model.to(device).eval(), path, about, facts, sampler, diffusion, decoder, pictures, notes)


def class_name_of(label: int, facts: ModelFacts, num_classes: int) -> str:
    """A class's name, or its number."""
    if label == num_classes:
        return "no class"
    return facts.class_names[label] if label < len(facts.class_names) else str(label)
