"""Sampling latents, with noise that belongs to the image and not to the batch.

Shapes: N images of this call, B of one batch, C latent channels, H, W latent pixels.

For DDPM (`DiffusionConfig.process`), through diffusers' schedulers:

ddpm   Ancestral sampling (arXiv 2006.11239, eq. 11) on a respaced chain (`space_timesteps`), as ADM and DiT do. With
       `arch.learn_sigma` the variance is interpolated in the log domain (2102.09672, eq. 15), else the posterior's.
ddim   Deterministic, eta = 0 (2010.02502, eq. 12). Timesteps end at T-1, where the latent is noise, so `steps` must
       divide T: diffusers steps by T // steps, and any other number would skip noise levels silently.
dpm    DPM-Solver++, second order, multistep (2211.01095).

For flow matching, on a grid of noise levels 1, 1 - 1/steps, ..., 0 with the process's shift:

euler  The probability-flow ODE by Euler's method; equal to diffusers' `FlowMatchEulerDiscreteScheduler`.
heun   The same by Heun's method; the last step is Euler's, as in EDM (2206.00364, algorithm 1).
sde    SiT's reverse SDE (2401.08740, eq. 8) by Euler-Maruyama, with the diffusion coefficient w = 2 s at noise level s
       (the authors' form "sigma"); the last step takes the mean.

Guidance is `null + scale * (label - null)` on all predicted channels, or on the first `guidance_channels`, and only at
noise levels within `guidance_interval`. What is not guided, a learned variance included, is the labeled half's. Both
halves go through the model at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.process import FlowProcess, Process, arithmetic, make_process
from fine_dist.diffusion.random_draws import image_generator
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.arch import Arch

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`model(z [B,C,H,W], t [B], y [B] int64) -> [B, C or 2C, H, W]`; a `DiT`, or any function."""
SCHEDULERS = {"ddpm": ("ddim", "ddpm", "dpm"), "flow": ("euler", "heun", "sde")}
"""Schedulers by process; the first is what `auto` stands for."""


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

    solve = _solve_flow if isinstance(process, FlowProcess) else _solve_ddpm
    return solve(process, predict, z, arch, resolve_scheduler(config, diffusion), generators)  # type: ignore[arg-type]


Predict = Callable[[Tensor, Tensor], Tensor]


def _solve_ddpm(
    process: Process, predict: Predict, z: Tensor, arch: Arch, config: SamplerConfig, generators: list[torch.Generator]
) -> Tensor:
    scheduler = build_scheduler(config, process.config, arch.learn_sigma)  # multistep solvers keep a history
    ancestral = config.scheduler == "ddpm"
    noisy = {"generator": generators} if ancestral else {}
    for step in scheduler.timesteps.tolist():
        out = predict(z, torch.tensor(step))
        # diffusers' schedulers take the variance channels only where they use them.
        out = out if ancestral and arch.learn_sigma else out[:, : arch.in_channels]
        z = scheduler.step(out, step, z, return_dict=False, **noisy)[0]
    return z


def _solve_flow(
    process: FlowProcess,
    predict: Predict,
    z: Tensor,
    arch: Arch,
    config: SamplerConfig,
    generators: list[torch.Generator],
) -> Tensor:
    levels = noise_levels(process, config.steps)

    def velocity(z: Tensor, level: Tensor) -> Tensor:
        """The derivative of z by the noise level."""
        return process.sign * predict(z, process.time_at(level))[:, : arch.in_channels]

    for level, following in itertools.pairwise(levels):
        step = float(following - level)  # below 0: from noise to data
        v = velocity(z, level)
        if config.scheduler == "sde":
            # Score s = -noise / level, so that w / 2 * s = -noise where w = 2 level: nothing is divided by the level.
            noise = z + (1 - float(level)) * v
            z = z + step * (v + noise)
            if following > 0:
                fresh = torch.cat([torch.randn(1, *z.shape[1:], generator=g) for g in generators]).to(z.device)
                z = z + (2 * float(level) * -step) ** 0.5 * fresh
        elif config.scheduler == "heun" and following > 0:
            ahead = velocity(z + step * v, following)
            z = z + step * (v + ahead) / 2
        else:
            z = z + step * v
    return z


def noise_levels(process: FlowProcess, steps: int) -> Tensor:
    """The noise levels [steps + 1] float32 of a sampler, from 1 to 0, after the process's shift."""
    return process.shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()


def resolve_scheduler(config: SamplerConfig, diffusion: DiffusionConfig) -> SamplerConfig:
    """The config with the scheduler that `auto` stands for. `ConfigError` for another process's scheduler."""
    legal = SCHEDULERS[diffusion.process]
    if config.scheduler == "auto":
        return config.model_copy(update={"scheduler": legal[0]})
    if config.scheduler not in legal:
        raise ConfigError(
            f"sampler.scheduler {config.scheduler}: it does not sample a model of process {diffusion.process}; legal: "
            f"auto, {', '.join(legal)}"
        )
    return config


def guided(model: Denoiser, z: Tensor, t: Tensor, labels: Tensor, null: int, scale: float, channels: int) -> Tensor:
    """The model's output [B, C or 2C, H, W] under classifier-free guidance of its first `channels` channels."""
    if scale == 1.0:
        return model(z, t, labels)
    nulls = torch.full_like(labels, null)
    # One pass over a doubled batch, as in DiT: half the kernel launches, and weights are read once.
    labelled, free = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([labels, nulls])).chunk(2)
    eps = free[:, :channels] + scale * (labelled[:, :channels] - free[:, :channels])
    return torch.cat([eps, labelled[:, channels:]], dim=1)


def build_scheduler(config: SamplerConfig, diffusion: DiffusionConfig, learn_sigma: bool) -> Any:
    """The diffusers scheduler of a DDPM's settings, its timesteps set. `ConfigError` when `steps` does not fit."""
    # diffusers loads all of torch.compile, three seconds that a process which draws nothing need not wait for
    import diffusers

    total, steps = diffusion.num_timesteps, config.steps
    if steps > total:
        raise ConfigError(f"sampler.steps {steps}: at most diffusion.num_timesteps, {total}")
    chain = {
        "num_train_timesteps": total,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction" if diffusion.predicts == "v" else "epsilon",
        # The sampler must use the schedule that the model was trained with, down to its last step.
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
    }
    if config.scheduler == "ddpm":
        if steps < 2:
            raise ConfigError(f"sampler.steps {steps}: ddpm needs at least 2 (the first is T-1, the last is 0)")
        variance = "learned_range" if learn_sigma else "fixed_small"
        ancestral: Any = diffusers.DDPMScheduler(**chain, variance_type=variance, clip_sample=False)
        # diffusers' own spacings differ from ADM's by a timestep here and there.
        ancestral.set_timesteps(timesteps=space_timesteps(total, [steps])[::-1])
        return ancestral
    if config.scheduler == "ddim":
        # diffusers takes t - T // steps for the step that follows: where the quotient
        # is rounded, it denoises to levels at which the next step does not begin.
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

    Positions are summed up and rounded to even, as ADM and DiT do: rounding products instead moves some by one.

    Args:
        total: T, the length of the trained chain.
        counts: The chain is cut into as many sections, equal but for one timestep, and each keeps this number of
            timesteps, its first and last among them. ADM and DiT sample with one section.

    Raises:
        ConfigError: A section is asked for more timesteps than it has.
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
            # Summed, not multiplied: ADM's floating-point sum rounds some
            # positions the other way, and results are compared with it.
            position += stride
        start += length
    return kept


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
