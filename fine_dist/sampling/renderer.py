"""A model with its sampler, diffusion process and decoder, ready to sample images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from fine_dist.sampling.image_grid import to_uint8
from fine_dist.sampling.settings import SamplingSettings

LONG_FLOPS = 2e13
"""Work from which its time is estimated by one call of the model: a minute or so of a CPU, less than 1 s of a GPU."""


@dataclass
class ImageRenderer:
    """Draws images of one model.

    Args:
        model: The model, on its device.
        where: Its name, for messages and titles.
        metadata: What is known of it, as `load_model` returns it.
        facts: What its manifest says of sampling.
        sampler: The resolved settings of the sampler.
        diffusion: The process it was trained for.
        decoder: Makes images of latents; None where latents are images themselves (`pictures` true) or stay latents.
        pictures: Whether `render` gives images, not latents.
        notes: What a user should know about the settings.
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

    def finish(self, latents: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W] of latents. Only where `pictures`."""
        return self.decoder.decode(latents) if self.decoder else to_uint8(latents.clamp(-1, 1))

    def render(
        self, labels: Tensor, numbers: Tensor, seed: int, progress: bool | str
    ) -> Iterator[tuple[SampledBatch, Tensor]]:
        """(sampled batch, images or latents) of images by number; one batch is decoded while the next is sampled.

        Args:
            labels: Class labels [N].
            numbers: Each image's own number [N], which decides its noise together with the seed.
            seed: The seed.
            progress: Show a progress bar; a text is its title.
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
        """The settings that determine an image, given its number and label (JSON)."""
        return {
            "model": self.metadata["hash"],
            # Noise belongs to an image's number, so the batch's size changes no image.
            "sampler": self.sampler.model_dump(mode="json", exclude={"batch"}),
            # Label dropout is a matter of training and changes no image.
            "diffusion": self.diffusion.model_dump(mode="json", exclude={"label_drop"}),
            "seed": seed,
        }

    def flops(self, count: int) -> float:
        """FLOPs of sampling so many images: two model evaluations a step with guidance, and two with Heun's method."""
        halves = 1 if self.sampler.guidance == 1 else 2
        evaluations = self.sampler.steps * (2 if self.sampler.scheduler == "heun" else 1)
        return 2.0 * forward_macs(self.model.arch) * halves * evaluations * count

    @torch.no_grad()
    def estimate(self, count: int) -> str:
        """What drawing so many images takes, in words: FLOPs, and the time where it is long.

        The time is that of a call of the model at the batch's size, of which a second call is measured.
        """
        flops = self.flops(count)
        text = f"{count:,} images of {self.model.arch.name}, {self.sampler.steps} steps, {flops:.2g} FLOP"
        if flops < LONG_FLOPS:
            return text
        device = next(self.model.parameters()).device
        # A CPU's speed hardly depends on the batch, a GPU's does.
        batch = min(count, self.sampler.batch) if device.type == "cuda" else 1
        z = torch.zeros(batch, *self.model.arch.latent_shape, device=device)
        t = make_process(self.diffusion).times([0.5] * batch).to(device)
        y = torch.zeros(batch, dtype=torch.int64, device=device)
        seconds = 0.0
        for _ in range(2):  # the first call may load kernels or compile
            begun = time.perf_counter()
            with arithmetic(self.sampler.precision, device):
                self.model(z, t, y)
            # Kernels run asynchronously; without waiting, the time would be that of handing them over.
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
        total = seconds * flops / (2.0 * forward_macs(self.model.arch) * batch)
        return f"{text}, about {duration(total)} in this process alone"


def make_renderer(config: SamplingSettings, path: str, device: torch.device | None) -> ImageRenderer:
    """Load a model from any source, with the settings of a command over those of its manifest.

    Raises:
        ArtifactError: The model or the VAE cannot be loaded.
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
    # A scheduler of `auto` becomes the process's own before the protocol is written, which must name what was used.
    sampler = resolve_scheduler(sampler, diffusion)
    return ImageRenderer(model, path, metadata, facts, sampler, diffusion, decoder, pictures, notes)


def class_name_of(label: int, facts: ModelFacts, num_classes: int) -> str:
    """A class's name, or its number where it has none."""
    if label == num_classes:
        return "no class"
    return facts.class_names[label] if label < len(facts.class_names) else str(label)
