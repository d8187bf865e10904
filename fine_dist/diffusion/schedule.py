"""The forward process of diffusion, and everything that is random in a training step.

Shapes: B batch, C latent channels, H latent side. Everything random is drawn on the CPU from (seed, step, position in
the global batch), so that it depends neither on the number of processes nor on the accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fine_dist.config import DiffusionConfig

_MASK = (1 << 64) - 1


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
    """A hash of some integers, 0 .. 2^63 - 1, good enough to seed a generator with.

    splitmix64's finaliser goes over each word; the lowest bit is given up, because a seed is a signed 64-bit number.
    """
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state + 0x9E3779B97F4A7C15 + (word & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
