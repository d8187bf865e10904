"""Sampling latents, with noise that depends on the image and not on the batch. `diffusion.solvers` has the solvers.

Shapes: N images of this call, B of one batch, C latent channels, H, W latent pixels.

Guidance is `null + scale * (label - null)` on all predicted channels, or on the first `guidance_channels`, and only at
noise levels within `guidance_interval`. Channels without guidance, such as a learned variance, are the labeled half's.
Both halves go through the model as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.process import FlowProcess, arithmetic, make_process
from fine_dist.diffusion.random_draws import image_generator
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.diffusion.solvers import build_scheduler, resolve_scheduler, solve_ddpm, solve_flow
from fine_dist.model.arch import Arch

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`model(z [B,C,H,W], t [B], y [B] int64) -> [B, C or 2C, H, W]`; a `DiT`, or any function."""


@dataclass(frozen=True)
class SampledBatch:
    """A batch of images: their own numbers [B] int64, labels [B] int64, latents [B, C, H, W] float32; on the CPU."""

    indices: Tensor
    labels: Tensor
    latents: Tensor


def sample(
    model: Denoiser,
    *,
    labels: Tensor,
    arch: Arch,
    config: SamplerConfig,
    diffusion: DiffusionConfig,
    seed: int,
    indices: Tensor | None = None,
    device: torch.device | str | None = None,
    progress: bool | str = False,
) -> Tensor:
    """Latents [N, C, H, W] float32 on the CPU, in the scale of the training latents: all of `sample_batches`."""
    parts = [
        batch.latents
        for batch in sample_batches(
            model,
            labels=labels,
            arch=arch,
            config=config,
            diffusion=diffusion,
            seed=seed,
            indices=indices,
            device=device,
            progress=progress,
        )
    ]
    return torch.cat(parts) if parts else torch.empty(0, *arch.latent_shape)


def sample_batches(
    model: Denoiser,
    *,
    labels: Tensor,
    arch: Arch,
    config: SamplerConfig,
    diffusion: DiffusionConfig,
    seed: int,
    indices: Tensor | None = None,
    start: int = 0,
    device: torch.device | str | None = None,
    progress: bool | str = False,
) -> Iterator[SampledBatch]:
    """Sample images in batches, lazily, so that any number of them can be written out in bounded memory.

    An image's noise depends on (seed, its index) and the step alone. Give rank r of W the labels and indices of its
    images, and the ranks together make the images of one process. The noise is then equal bit for bit; the latents are
    equal within 1e-5 in fp32 (times `2 guidance - 1`), because matrix products of another batch size sum in another
    order.

    Args:
        model: A `Denoiser`; an `nn.Module` is in eval mode while a batch is sampled.
        labels: [N] int64, 0..num_classes-1, or num_classes for the null label.
        arch: Gives the latent shape and the null label.
        config: The sampler.
        diffusion: The process the model was trained for.
        seed: Seeds the noise of all images.
        indices: [N] int64, each image's own number. Default: 0..N-1.
        start: Number of images to skip at the front, which an interrupted call has sampled.
        device: Where to compute. Default: where the model is.
        progress: Show a progress bar on stderr; a text is its title.

    Raises:
        ConfigError: Before anything is sampled, where the scheduler or `steps` does not fit the process, labels and
            indices do not fit each other or the model, or the model cannot be guided.
    """
    indices = torch.arange(len(labels)) if indices is None else indices.cpu()
    _check(labels, indices, arch, config, diffusion)
    config = resolve_scheduler(config, diffusion)
    # Built and thrown away: it raises for illegal settings here, before the generator is first advanced.
    if diffusion.process == "ddpm":
        build_scheduler(config, diffusion, arch.learn_sigma)
    where = torch.device(device) if device is not None else _device_of(model)
    return _batches(model, labels.cpu(), indices, arch, config, diffusion, seed, start, where, progress)


def _batches(
    model: Denoiser,
    labels: Tensor,
    indices: Tensor,
    arch: Arch,
    config: SamplerConfig,
    diffusion: DiffusionConfig,
    seed: int,
    start: int,
    device: torch.device,
    progress: bool | str,
) -> Iterator[SampledBatch]:
    bar = _bar(progress, len(labels), start)
    try:
        for first in range(start, len(labels), config.batch):
            part = slice(first, first + config.batch)
            # Set for each batch and restored, because the caller may train between two batches of this generator.
            was_training = isinstance(model, nn.Module) and model.training
            if isinstance(model, nn.Module):
                model.eval()
            try:
                z = _sample_batch(model, labels[part].to(device), indices[part], arch, config, diffusion, seed, device)
            finally:
                if isinstance(model, nn.Module):
                    model.train(was_training)
            bar.update(len(z))
            yield SampledBatch(indices[part], labels[part], z.float().cpu())
    finally:
        bar.close()


@torch.no_grad()
def _sample_batch(
    model: Denoiser,
    labels: Tensor,
    indices: Tensor,
    arch: Arch,
    config: SamplerConfig,
    diffusion: DiffusionConfig,
    seed: int,
    device: torch.device,
) -> Tensor:
    process = make_process(diffusion).to(device)
    generators = [image_generator(seed, int(index)) for index in indices]
    # A generator for each image, on the CPU: batch size, world size and device do not change the noise.
    z = torch.cat([torch.randn(1, *arch.latent_shape, generator=g) for g in generators]).to(device)  # B,C,H,W
    guided_channels = config.guidance_channels or arch.in_channels

    def predict(z: Tensor, t: Tensor) -> Tensor:
        """The guided output [B, C or 2C, H, W] float32 at a time [], its prediction clamped."""
        level = float(process.noise_level(t))
        scale = config.guidance if config.guidance_interval[0] <= level <= config.guidance_interval[1] else 1.0
        times = torch.full((len(z),), t.item(), dtype=t.dtype, device=device)  # a copy of t would wait for the device
        with arithmetic(config.precision, device):
            out = guided(model, z, times, labels, arch.num_classes, scale, guided_channels).float()
        if config.clip is None:
            return out
        prediction = process.clamp(z, times, out[:, : arch.in_channels], config.clip)
        return torch.cat([prediction, out[:, arch.in_channels :]], dim=1)

    solve = solve_flow if isinstance(process, FlowProcess) else solve_ddpm
    return solve(process, predict, z, arch, config, generators)  # type: ignore[arg-type]


def guided(model: Denoiser, z: Tensor, t: Tensor, labels: Tensor, null: int, scale: float, channels: int) -> Tensor:
    """The model's output [B, C or 2C, H, W] under classifier-free guidance of its first `channels` channels."""
    if scale == 1.0:
        return model(z, t, labels)
    nulls = torch.full_like(labels, null)
    # One pass over a doubled batch, as in DiT: half the kernel launches, and weights are read once.
    labelled, free = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([labels, nulls])).chunk(2)
    eps = free[:, :channels] + scale * (labelled[:, :channels] - free[:, :channels])
    return torch.cat([eps, labelled[:, channels:]], dim=1)


def _check(labels: Tensor, indices: Tensor, arch: Arch, config: SamplerConfig, diffusion: DiffusionConfig) -> None:
    if labels.ndim != 1 or labels.shape != indices.shape:
        raise ConfigError(
            f"labels and indices must be two lists of one length, not {list(labels.shape)} and {list(indices.shape)}"
        )
    wrong = labels[(labels < 0) | (labels > arch.num_classes)]
    if len(wrong):
        raise ConfigError(
            f"label {int(wrong[0])} is out of range; legal: 0..{arch.num_classes - 1}, or {arch.num_classes} (null)"
        )
    if config.guidance != 1.0 and diffusion.label_drop == 0:
        raise ConfigError(
            f"sampler.guidance {config.guidance:g}: the model was trained with diffusion.label_drop 0, so its null "
            "label means nothing; use guidance 1, or train with label_drop above 0"
        )
    if config.guidance_channels is not None and config.guidance_channels > arch.in_channels:
        raise ConfigError(
            f"sampler.guidance_channels {config.guidance_channels}: the model's latents have {arch.in_channels} "
            f"channels; legal: 1..{arch.in_channels}, or none for all"
        )


def _device_of(model: Denoiser) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def _bar(progress: bool | str, total: int, done: int) -> Any:
    title = progress if isinstance(progress, str) else "sample"
    return tqdm(total=total, initial=done, desc=title, unit="image", disable=None if progress else True, leave=False)
