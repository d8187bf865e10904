"""The training loss of a DiT: noise prediction, and the learned variance's bound (Improved DDPM, arXiv 2102.09672).

Shapes: B batch, C latent channels, H latent side. Everything random is drawn on the CPU from (seed, step, position in
the global batch), so that it depends neither on the number of processes nor on the accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from fine_dist.config import DiffusionConfig

if TYPE_CHECKING:
    from fine_dist.model.zoo import Arch

_MASK = (1 << 64) - 1


class LatentBatch(Protocol):
    """What a loss needs of a batch (`fine_dist.data.stream.Batch`)."""

    @property
    def step(self) -> int: ...
    @property
    def latents(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...


class NoiseSchedule(nn.Module):
    """The forward process q(z_t | z_0) with a linear variance schedule; tables of length T in float32."""

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        beta = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, 0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        posterior = beta * (1 - previous) / (1 - alpha_bar)
        # The posterior's variance is zero at t = 0; its logarithm is taken at t = 1 there (Improved DDPM, section 3.1).
        clipped = torch.cat([posterior[1:2], posterior[1:]]) if config.num_timesteps > 1 else beta
        tables = {
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "log_beta": beta.log(),
            "log_posterior": clipped.log(),
            "mean_start": beta * previous.sqrt() / (1 - alpha_bar),
            "mean_noisy": (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.num_timesteps = config.num_timesteps

    def at(self, name: str, t: Tensor) -> Tensor:
        """A table's entries at timesteps [B], shaped [B, 1, 1, 1]."""
        return self.get_buffer(name)[t][:, None, None, None]

    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """`z_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps`, all [B, C, H, H]."""
        return self.at("signal", t) * z + self.at("noise", t) * eps


@dataclass(frozen=True)
class Draws:
    """What is random in a step: timesteps [B] int64, noise [B, C, H, H] float32, dropped labels [B] bool."""

    t: Tensor
    noise: Tensor
    drop: Tensor


def draw(
    seed: int, step: int, positions: Tensor, shape: tuple[int, int, int], *, num_timesteps: int, label_drop: float
) -> Draws:
    """The draws of some positions of a step's global batch; each is the same whichever others are asked for."""
    generator = torch.Generator()
    noise = torch.empty(len(positions), *shape)
    t = torch.empty(len(positions), dtype=torch.int64)
    drop = torch.empty(len(positions), dtype=torch.bool)
    for row, position in enumerate(positions.tolist()):
        generator.manual_seed(mix(seed, step, position))
        u = torch.rand(2, generator=generator, dtype=torch.float64)
        t[row] = int(u[0] * num_timesteps)
        drop[row] = bool(u[1] < label_drop)
        noise[row].normal_(generator=generator)
    return Draws(t, noise, drop)


def mix(*words: int) -> int:
    """A 63-bit hash of some integers (splitmix64's finaliser over each), good enough to seed a generator with."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state + 0x9E3779B97F4A7C15 + (word & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Objective:
    """The loss of a batch, a number a sample: `objective(model, batch) -> [B]` float32.

    teacher, distill: an ancestor to imitate as well; adds `distill` times the mean squared difference between the two
    full outputs (methods.md, FINE stage 1).
    """

    def __init__(
        self,
        config: DiffusionConfig,
        arch: Arch,
        seed: int,
        teacher: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        distill: float = 0.0,
    ):
        self.config, self.arch, self.seed = config, arch, seed
        self.schedule = NoiseSchedule(config)
        self.teacher, self.distill = teacher, distill

    def __call__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], batch: LatentBatch) -> Tensor:
        device = batch.latents.device
        draws = draw(
            self.seed,
            batch.step,
            batch.positions,
            self.arch.latent_shape,
            num_timesteps=self.config.num_timesteps,
            label_drop=self.config.label_drop,
        )
        t, eps, drop = (x.to(device, non_blocking=True) for x in (draws.t, draws.noise, draws.drop))
        y = torch.where(drop, self.arch.num_classes, batch.labels)
        self.schedule.to(device)
        z_t = self.schedule.add_noise(batch.latents, t, eps)
        out = model(z_t, t, y).float()
        losses = per_sample(self.schedule, out, batch.latents, z_t, t, eps)
        if self.teacher is not None and self.distill:
            with torch.no_grad():
                wanted = self.teacher(z_t, t, y).float()
            losses = losses + self.distill * (out - wanted).square().flatten(1).mean(1)
        return losses


def per_sample(schedule: NoiseSchedule, out: Tensor, z: Tensor, z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """`||eps - eps_theta||^2 / size` for each sample, plus the variance's bound when the model predicts one.

    The hybrid objective weighs the bound (in nats, a sum over T timesteps) by 0.001; with T = 1000 and a uniform t that
    is the bound's own term at t. DiT measures it in bits, and so do we. The mean is held fixed inside it.
    """
    channels = z.shape[1]
    losses = (out[:, :channels] - eps).square().flatten(1).mean(1)
    if out.shape[1] == 2 * channels:
        losses = losses + variance_bound(schedule, out, z, z_t, t)
    return losses


def variance_bound(schedule: NoiseSchedule, out: Tensor, z: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """KL(q(z_{t-1} | z_t, z_0) || p_theta(z_{t-1} | z_t)) in bits a dimension, [B]; at t = 0 the decoder's."""
    eps_hat, v = out.detach()[:, : z.shape[1]], out[:, z.shape[1] :]
    start = (z_t - schedule.at("noise", t) * eps_hat) / schedule.at("signal", t)
    mean = schedule.at("mean_start", t) * start + schedule.at("mean_noisy", t) * z_t
    true_mean = schedule.at("mean_start", t) * z + schedule.at("mean_noisy", t) * z_t
    true_log = schedule.at("log_posterior", t)
    fraction = (v + 1) / 2  # the model's -1 .. 1 spans posterior .. beta (eq. 15)
    log_var = fraction * schedule.at("log_beta", t) + (1 - fraction) * true_log
    kl = 0.5 * (log_var - true_log + (true_log - log_var).exp() + (true_mean - mean).square() * (-log_var).exp() - 1)
    nll = -discretised_log_likelihood(z, mean, log_var)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def discretised_log_likelihood(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log of a Gaussian's mass in a bin of width 2/255 around z (DDPM, arXiv 2006.11239, eq. 13)."""
    precision = (-0.5 * log_var).exp()

    def cdf(x: Tensor) -> Tensor:
        return torch.special.ndtr(x * precision)

    above, below = cdf(z - mean + 1 / 255), cdf(z - mean - 1 / 255)
    mass = torch.where(z < -0.999, above, torch.where(z > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


class HeldOut:
    """Held-out noise-prediction loss at fixed timesteps and noise: `measure(model) -> {"held_out_loss": float}`.

    Every sample is measured at `per_sample` timesteps, spread evenly over the chain, with its own fixed noise and its
    true label, so that two models are compared on the very same questions.
    """

    def __init__(self, latents: Tensor, labels: Tensor, config: DiffusionConfig, seed: int = 0, per_sample: int = 4):
        self.schedule = NoiseSchedule(config)
        n, shape = len(latents), latents.shape[1:]
        generator = torch.Generator().manual_seed(mix(seed, 0x4E1D))
        stratum = torch.arange(n * per_sample).double()
        self.t = ((stratum + 0.5) / (n * per_sample) * config.num_timesteps).long()
        order = torch.randperm(n * per_sample, generator=generator)
        self.z = latents.repeat(per_sample, 1, 1, 1)[order]
        self.y = labels.repeat(per_sample)[order]
        self.eps = torch.randn(n * per_sample, *shape, generator=generator)

    @torch.no_grad()
    def __call__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], batch: int = 256) -> dict[str, float]:
        device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
        total = torch.zeros((), dtype=torch.float64)
        self.schedule.to(device)
        for start in range(0, len(self.t), batch):
            z, y, t, eps = (x[start : start + batch].to(device) for x in (self.z, self.y, self.t, self.eps))
            out = model(self.schedule.add_noise(z, t, eps), t, y)[:, : z.shape[1]].float()
            total += (out - eps).square().flatten(1).mean(1).double().sum().cpu()
        return {"held_out_loss": float(total / len(self.t))}
