"""A model with its sampler, diffusion process and decoder, ready to sample images.

Letters: N images, B images of a batch, C channels, H, W height and width of an image.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.artifacts.autoencoder import Decoder, decode_batches
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.model_facts import ModelFacts, model_facts_of, resolve_sampling
from fine_dist.core.errors import ConfigError
from fine_dist.core.logs import duration
from fine_dist.diffusion.process import arithmetic, make_process
from fine_dist.diffusion.samplers import SampledBatch, sample_batches
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.diffusion.solvers import resolve_scheduler
from fine_dist.engine.compiling import compile_or_fall_back
from fine_dist.model.dit import DiT
from fine_dist.model.flops import forward_macs
from fine_dist.sampling.image_grid import latents_as_images, to_uint8
from fine_dist.sampling.settings import SamplingSettings

LONG_FLOPS = 2e13
"""FLOPs from which the duration is measured and reported: about a minute on a CPU, less than 1 s on a GPU."""


@dataclass
class ImageRenderer:
    """Samples images of one model.

    Args:
        model: The model, on its device.
        where: Name of the model, for messages and titles.
        metadata: Metadata of the model, as `load_model` returns them.
        facts: The facts in the metadata that sampling needs.
        sampler: Settings of the sampler.
        diffusion: The process that the model was trained for.
        decoder: Autoencoder of the latents. None if the latents are pixels, or are not decoded.
        pictures: Whether `render` yields images; otherwise it yields latents.
        notes: Sentences for the user: settings that differ from those of the manifest.
    """

    model: DiT
    where: str
    metadata: dict[str, Any]
    facts: ModelFacts
    sampler: SamplerConfig
    diffusion: DiffusionConfig
    decoder: Decoder | None
    pictures: bool
    notes: list[str] = field(default_factory=list)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images in a grid: decoded ones, or the channels of latents as gray images."""
        # A blank latent is decoded, because only the autoencoder knows the size of its images.
        blank = torch.zeros(1, *self.model.arch.latent_shape)
        _, channels, height, width = (self.finish(blank) if self.pictures else latents_as_images(blank)).shape
        return channels, height, width

    def finish(self, latents: Tensor) -> Tensor:
        """Convert latents to images uint8 [B, C, H, W]. Requires that `pictures` is true."""
        return self.decoder.decode(latents) if self.decoder else to_uint8(latents.clamp(-1, 1))

    def render(
        self, labels: Tensor, numbers: Tensor, seed: int, progress: bool | str
    ) -> Iterator[tuple[SampledBatch, Tensor]]:
        """Sample images, and yield each batch with its images (or its latents, if `pictures` is false).

        With an autoencoder, one batch is decoded while the next is sampled.

        Args:
            labels: Class labels [N] int64.
            numbers: Number of each image, [N] int64. An image's noise depends on it and the seed only.
            seed: Random seed.
            progress: Whether to show a progress bar; a string is its title.
        """
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
            yield from decode_batches(batches, self.decoder)
            return
        for batch in batches:
            yield batch, self.finish(batch.latents) if self.pictures else batch.latents

    def protocol(self, seed: int) -> dict[str, Any]:
        """Return the settings that determine an image, given its number and label, as JSON values."""
        return {
            "model": self.metadata["hash"],
            # Noise depends on an image's number, so the batch size changes no image.
            "sampler": self.sampler.model_dump(mode="json", exclude={"batch"}),
            # Label dropout is used in training only.
            "diffusion": self.diffusion.model_dump(mode="json", exclude={"label_drop"}),
            "seed": seed,
        }

    def flops(self, count: int) -> float:
        """Return the FLOPs of sampling `count` images, without those of the decoder."""
        # Heun's method doubles the evaluations of the model in a step, and so does guidance, in its interval.
        low, high = self.sampler.guidance_interval
        per_step = (1 if self.sampler.guidance == 1 else 1 + high - low) * (
            2 if self.sampler.scheduler == "heun" else 1
        )
        return 2.0 * forward_macs(self.model.arch) * per_step * self.sampler.steps * count

    @torch.no_grad()
    def estimate(self, count: int) -> str:
        """Return a line with the FLOPs of sampling `count` images and, from `LONG_FLOPS` on, an estimate of the time.

        The estimate extrapolates the measured time of one call of the model.
        """
        flops = self.flops(count)
        text = f"{count:,} images of {self.model.arch.name}, {self.sampler.steps} steps, {flops:.2g} FLOP"
        if flops < LONG_FLOPS:
            return text
        device = next(self.model.parameters()).device
        # The FLOP/s of a GPU depend on the batch size, those of a CPU hardly do.
        batch = min(count, self.sampler.batch) if device.type == "cuda" else 1
        z = torch.zeros(batch, *self.model.arch.latent_shape, device=device)
        t = make_process(self.diffusion).times([0.5] * batch).to(device)
        y = torch.zeros(batch, dtype=torch.int64, device=device)
        seconds = 0.0
        for _ in range(2):  # the second call counts: the first one may load kernels or compile
            begun = time.perf_counter()
            with arithmetic(self.sampler.precision, device):
                self.model(z, t, y)
            # Kernels run asynchronously, and without this only their launch would be measured.
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
        total = seconds * flops / (2.0 * forward_macs(self.model.arch) * batch)
        return f"{text}, about {duration(total)} in this process alone"


def make_renderer(config: SamplingSettings, path: str, device: torch.device | None) -> ImageRenderer:
    """Load a model by path or hub name, and combine a command's settings with those of the model's manifest.

    Raises:
        ArtifactError: The model or the autoencoder cannot be loaded.
        ConfigError: The settings do not fit the model.
    """
    model, metadata = load_model(path, config.learngene, config.weights, config.hints)
    facts = model_facts_of(metadata)
    sampler, diffusion, notes = resolve_sampling(config.sampler, config.diffusion, facts, path)
    pictures, decoder = facts.pictures(model.arch.in_channels), None
    if config.vae:
        if facts.codec == "identity":
            raise ConfigError(f"vae: the model of {path} was trained on images, not on latents; leave it out")
        decoder = Decoder(
            config.vae,
            scaling_factor=facts.scaling_factor,
            shift_factor=facts.shift_factor,
            device=device or "cpu",
            precision=config.vae_precision,
        )
        if decoder.channels not in (None, model.arch.in_channels):
            raise ConfigError(
                f"vae: {config.vae} decodes latents of {decoder.channels} channels, and the model of {path} makes "
                f"{model.arch.in_channels}"
            )
        pictures = True
    model = model.to(device).eval()
    if sampler.compile:
        blocks = getattr(model, "blocks", None)
        compile_or_fall_back(list(blocks) if isinstance(blocks, nn.ModuleList) else [model])
    # `auto` is resolved here, because `protocol` must name the scheduler that was used.
    sampler = resolve_scheduler(sampler, diffusion)
    return ImageRenderer(model, path, metadata, facts, sampler, diffusion, decoder, pictures, notes)


def class_name_of(label: int, facts: ModelFacts, num_classes: int) -> str:
    """Return the name of a class, or its number if the model's manifest names none; "no class" for the null label."""
    if label == num_classes:
        return "no class"
    return facts.class_names[label] if label < len(facts.class_names) else str(label)
