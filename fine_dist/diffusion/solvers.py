"""The solvers that samplers step with, and the timesteps or noise levels that they visit.

Shapes: B images of a batch, C latent channels, H, W latent pixels.

For DDPM (`DiffusionConfig.process`), through diffusers' schedulers:

ddpm   Ancestral sampling (arXiv 2006.11239, eq. 11) on a respaced chain (`space_timesteps`), as ADM and DiT do. With
       `arch.learn_sigma` the variance is interpolated in the log domain (2102.09672, eq. 15), else the posterior's.
ddim   Deterministic, eta = 0 (2010.02502, eq. 12). Timesteps end at T-1, where the latent is noise, so `steps` must
       divide T: diffusers steps by T // steps, and any other number would skip noise levels silently.
dpm    DPM-Solver++, second order, multistep (2211.01095).

For flow matching, on a grid of noise levels 1, 1 - 1/steps, ..., 0 with the process's shift:

euler  The probability-flow ODE by Euler's method; equal to diffusers' `FlowMatchEulerDiscreteScheduler`.
heun   The same ODE by Heun's method; the last step is Euler's, as in EDM (2206.00364, algorithm 1).
sde    SiT's reverse SDE (2401.08740, eq. 8) by Euler-Maruyama, with the diffusion coefficient w = 2 s at noise level s
       (the authors' form "sigma"); the last step takes the mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.process import FlowProcess, Process
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.arch import Arch

SCHEDULERS = {"ddpm": ("ddim", "ddpm", "dpm"), "flow": ("euler", "heun", "sde")}
"""Schedulers by process; the first is what `auto` stands for."""
Predict = Callable[[Tensor, Tensor], Tensor]
"""`predict(z [B, C, H, W], t [])` -> the guided output [B, C or 2C, H, W] float32 at one time."""


def solve_ddpm(
    process: Process, predict: Predict, z: Tensor, arch: Arch, config: SamplerConfig, generators: list[torch.Generator]
) -> Tensor:
    """Latents [B, C, H, W] from noise z, by the DDPM scheduler that `config` names."""
    scheduler = build_scheduler(config, process.config, arch.learn_sigma)  # a new one: multistep solvers keep a history
    ancestral = config.scheduler == "ddpm"
    noisy = {"generator": generators} if ancestral else {}
    for step in scheduler.timesteps.tolist():
        out = predict(z, torch.tensor(step))
        # diffusers' schedulers take the variance channels only where they use them.
        out = out if ancestral and arch.learn_sigma else out[:, : arch.in_channels]
        z = scheduler.step(out, step, z, return_dict=False, **noisy)[0]
    return z


def solve_flow(
    process: FlowProcess,
    predict: Predict,
    z: Tensor,
    arch: Arch,
    config: SamplerConfig,
    generators: list[torch.Generator],
) -> Tensor:
    """Latents [B, C, H, W] from noise z, by the flow solver that `config` names."""
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


def build_scheduler(config: SamplerConfig, diffusion: DiffusionConfig, learn_sigma: bool) -> Any:
    """The diffusers scheduler of a DDPM's settings, its timesteps set. `ConfigError` when `steps` does not fit."""
    # Imported late: diffusers loads torch.compile, three seconds that a process without sampling need not wait for.
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
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise ConfigError(f"{count} timesteps of a section of {length}; legal: 1..{length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            # Summed, not multiplied: ADM's floating-point sum rounds some
            # positions the other way, and results are compared with it.
            position += stride
        start += length
    return timesteps
