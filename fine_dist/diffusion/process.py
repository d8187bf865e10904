"""The forward process of diffusion, and everything that is random in a training step.

Shapes: B batch, C latent channels, H latent side. Everything random is drawn on the CPU from (seed, step, position in
the global batch), so that it depends neither on the number of processes nor on the accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fine_dist.diffusion.settings import DiffusionConfig

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
    seed: int,
    step: int,
    positions: Tensor,
    shape: tuple[int, int, int],
    *,
    num_timesteps: int,
    label_drop: float,
    pin: bool = False,
) -> Draws:
    """The draws of some positions of a step's global batch; each is the same whichever others are asked for.

    positions: int64 [B], in host memory. pin: into page-locked memory, which a GPU copies from beside the host's work.
    """
    generator = torch.Generator()
    times, dropped = [], []
    noise = torch.empty(len(positions), *shape, pin_memory=pin)
    for position, values in zip(positions.tolist(), noise):
        generator.manual_seed(mix(seed, step, position))
        time, chance = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        times.append(int(time * num_timesteps))
        dropped.append(chance < label_drop)
        values.normal_(generator=generator)
    t = torch.tensor(times, dtype=torch.int64, pin_memory=pin)
    return Draws(t, noise, torch.tensor(dropped, dtype=torch.bool, pin_memory=pin))


class PrefetchedDraws:
    """Whoever asks for some positions of a step has the next step's drawn by a thread meanwhile.

    A draw is a function of (seed, step, position), so what was drawn ahead and is not asked for (a run that resumed
    elsewhere) is dropped, what is asked for and was not drawn is drawn at once, and both are the same numbers.

    draw: `draw` with its other arguments: `(step, positions, pin=...) -> Draws`.
    """

    def __init__(self, draw: Callable[..., Draws]) -> None:
        self._draw = draw
        self._ready: dict[tuple[int, bytes], Future[Draws]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, step: int, positions: Tensor, pin: bool = False) -> Draws:
        """The draws of these positions of a step."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="draws")
        places = positions.numpy().tobytes()
        for stale in [key for key in self._ready if key[0] < step]:
            self._ready.pop(stale).cancel()
        ready = self._ready.pop((step, places), None)
        if (step + 1, places) not in self._ready:
            self._ready[step + 1, places] = self._pool.submit(self._draw, step + 1, positions, pin=pin)
        return self._draw(step, positions, pin=pin) if ready is None else ready.result()


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
