"""Sampling latents through diffusers' schedulers, with noise that belongs to the image and not to the batch.

Shapes: N images of this call, B of one batch, C latent channels, H, W latent pixels.

Three schedulers (`SamplerConfig.scheduler`), all over the linear schedule of `DiffusionConfig`:

ddpm  ancestral (arXiv 2006.11239, eq. 11) on a respaced chain: `space_timesteps`, which ADM and DiT use. With
      `arch.learn_sigma` the variance is interpolated in the log domain (2102.09672, eq. 15), else the posterior's.
ddim  deterministic, eta = 0 (2010.02502, eq. 12). Timesteps end at T-1, where the latent is noise, so `steps` must
      divide T: diffusers steps by T // steps, and any other number would skip noise levels silently.
dpm   DPM-Solver++, second order, multistep (2211.01095).

Guidance is `null + scale * (label - null)` on all noise channels, or on the first `guidance_channels`; what is not
guided, a learned variance included, is the labelled half's. Both halves go through the model at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.arch import Arch

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`model(z [B,C,H,W], t [B] int64, y [B] int64) -> [B, C or 2C, H, W]`; a `DiT`, or any function."""


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
    """Latents [N, C, H, W] float32 on the CPU, in the scale the model was trained on: all of `sample_batches`."""
    parts = [
        drawn.latents
        for drawn in sample_batches(
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
    """The images in batches, each drawn when it is asked for: nothing is kept, so that any number can be written out.

    model:    a `Denoiser`; an `nn.Module` is in eval mode while a batch is drawn.
    labels:   [N] int64, 0..num_classes-1, or num_classes for the null label.
    indices:  [N] int64, each image's own number (None: 0..N-1). An image's noise depends on `(seed, index)` and
              the step alone: give rank r of W the labels and indices of its images, and the ranks together make what
              one process makes. The noise is then equal bit for bit; the latents are equal within 1e-5 in fp32 (times
              `2 guidance - 1`), because matrix products sum in another order when the batch has another size.
    start:    images to leave out at the front, drawn by an earlier call that was cut off.
    device:   where to compute (None: where the model is).
    progress: show a bar on stderr; a text is its title.

    Raises `ConfigError`, before anything is drawn, when `steps` does not fit the chain, labels and indices do not fit
    each other or the model, or the model cannot be guided.
    """
    indices = torch.arange(len(labels)) if indices is None else indices.cpu()
    _check(labels, indices, arch, config, diffusion)
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
    scheduler = build_scheduler(config, diffusion, arch.learn_sigma)  # a fresh one: multistep solvers keep a history
    generators = [image_generator(seed, int(index)) for index in indices]
    z = torch.cat([torch.randn(1, *arch.latent_shape, generator=g) for g in generators]).to(device)  # B,C,H,W
    guided_channels = config.guidance_channels or arch.in_channels
    takes_variance = config.scheduler == "ddpm" and arch.learn_sigma
    noisy = {"generator": generators} if config.scheduler == "ddpm" else {}
    for step in scheduler.timesteps.tolist():
        t = torch.full((len(z),), step, dtype=torch.int64, device=device)
        out = guided(model, z, t, labels, arch.num_classes, config.guidance, guided_channels).float()
        eps = out[:, : arch.in_channels]
        if config.clip is not None:
            eps = clip_start(z, eps, float(scheduler.alphas_cumprod[step]), config.clip)
        out = torch.cat([eps, out[:, arch.in_channels :]], dim=1) if takes_variance else eps
        z = scheduler.step(out, step, z, return_dict=False, **noisy)[0]
    return z


def guided(model: Denoiser, z: Tensor, t: Tensor, labels: Tensor, null: int, scale: float, channels: int) -> Tensor:
    """The model's output [B, C or 2C, H, W] under classifier-free guidance of its first `channels` channels."""
    if scale == 1.0:
        return model(z, t, labels)
    nulls = torch.full_like(labels, null)
    labelled, free = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([labels, nulls])).chunk(2)
    eps = free[:, :channels] + scale * (labelled[:, :channels] - free[:, :channels])
    return torch.cat([eps, labelled[:, channels:]], dim=1)


def clip_start(z: Tensor, eps: Tensor, alpha_bar: float, limit: float) -> Tensor:
    """The noise whose clean latent is the predicted one, clamped to [-limit, limit]; z and eps are [B, C, H, W].

    Near t = T a clean latent is eps's error times 1 / sqrt(alpha_bar), about 160: small models wander off without it.
    Rewriting eps does the same to every scheduler; diffusers' own clipping differs between them.
    """
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    start = ((z - noise * eps) / signal).clamp(-limit, limit)
    return (z - signal * start) / noise


def build_scheduler(config: SamplerConfig, diffusion: DiffusionConfig, learn_sigma: bool) -> Any:
    """The diffusers scheduler of these settings, its timesteps set. `ConfigError` when `steps` does not fit."""
    import diffusers

    total, steps = diffusion.num_timesteps, config.steps
    if steps > total:
        raise ConfigError(f"sampler.steps {steps}: at most diffusion.num_timesteps, {total}")
    chain = {
        "num_train_timesteps": total,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": "linear",
    }
    if config.scheduler == "ddpm":
        if steps < 2:
            raise ConfigError(f"sampler.steps {steps}: ddpm needs at least 2 (the first is T-1, the last is 0)")
        variance = "learned_range" if learn_sigma else "fixed_small"
        ancestral: Any = diffusers.DDPMScheduler(**chain, variance_type=variance, clip_sample=False)
        ancestral.set_timesteps(timesteps=space_timesteps(total, [steps])[::-1])
        return ancestral
    if config.scheduler == "ddim":
        if total % steps:
            legal = [n for n in range(1, total + 1) if total % n == 0]
            near = sorted(sorted(legal, key=lambda n: abs(n - steps))[:3])
            raise ConfigError(
                f"sampler.steps {steps}: ddim needs a divisor of {total} timesteps; nearest legal: {near}"
            )
        scheduler: Any = diffusers.DDIMScheduler(**chain, clip_sample=False, timestep_spacing="trailing")
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **chain, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
        )
    scheduler.set_timesteps(steps)
    return scheduler


def space_timesteps(total: int, counts: Sequence[int]) -> list[int]:
    """The timesteps, ascending, that a respaced chain keeps (Improved DDPM, arXiv 2102.09672, section 4).

    total:  T, the length of the trained chain.
    counts: the chain is cut into as many sections, equal but for one timestep; each keeps so many, its first and its
            last among them. One count is what ADM and DiT sample with.

    Positions are summed up and rounded to even, as those two do: rounding products instead moves some by one.
    `ConfigError` when a section is asked for more timesteps than it has.
    """
    size, longer = divmod(total, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise ConfigError(f"{count} timesteps of a section of {length}; legal: 1..{length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of one image: first its initial noise, then one draw a step. Always on the CPU.

    A CPU generator keeps only 32 bits of its seed. The mapping below is one-to-one in `index` for each `seed`, so
    that two images of a run never share their noise (random 32-bit seeds would: 50,000 images, one pair in four runs).
    """
    offset = int.from_bytes(hashlib.blake2b(f"fine_dist.sample {seed}".encode(), digest_size=4).digest(), "little")
    x = (index + offset) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3, a bijection
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    generator = torch.Generator()
    generator.manual_seed(x ^ (x >> 16))
    return generator


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
    from tqdm import tqdm

    title = progress if isinstance(progress, str) else "sample"
    return tqdm(total=total, initial=done, desc=title, unit="image", disable=None if progress else True, leave=False)
