"""Random draws of training and sampling (timesteps, noise, label drop), on the CPU, from a seed and a position alone.

A draw depends on (seed, step, position in the global batch) or on (seed, image number). It therefore does not depend on
the number of processes, on the batch size or on the accelerator, and a resumed run continues with the same numbers.

Shapes: B batch, C latent channels, H latent side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_dist.core.seeds import mix


@dataclass(frozen=True)
class RandomDraws:
    """The randomness of a step: times [B] as the model sees them, noise [B, C, H, H], dropped labels [B] bool."""

    t: Tensor
    noise: Tensor
    drop: Tensor


def draw(
    seed: int,
    step: int,
    positions: Tensor,
    shape: tuple[int, int, int],
    *,
    times: Callable[[Sequence[float]], Tensor],
    label_drop: float,
    pin: bool = False,
) -> RandomDraws:
    """Draw the randomness of some positions of a step's global batch.

    Each position has its own generator, so a position's draws are the same whichever others are asked for.

    Args:
        seed: Seed of the run.
        step: Number of the training step.
        positions: int64 [B], in host memory.
        shape: Shape of a latent, (C, H, H).
        times: Maps uniform numbers in [0, 1) to the process's times (`Process.times`).
        label_drop: Probability of the null label.
        pin: Put the results into page-locked memory, from which a GPU copies while the host continues.
    """
    generator = torch.Generator()
    uniform, dropped = [], []
    noise = torch.empty(len(positions), *shape, pin_memory=pin)
    for position, values in zip(positions.tolist(), noise):
        # One generator, seeded anew for each position: creating a generator takes longer than drawing with it.
        generator.manual_seed(mix(seed, step, position))
        # In fp64, because quantile functions of times stretch the rounding of a uniform number. Both are
        # drawn even where labels are never dropped: the noise behind them must not depend on that setting.
        time, chance = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        uniform.append(time)
        dropped.append(chance < label_drop)
        values.normal_(generator=generator)
    t = times(uniform)
    return RandomDraws(t.pin_memory() if pin else t, noise, torch.tensor(dropped, dtype=torch.bool, pin_memory=pin))


class PrefetchedDraws:
    """Draws of a step, of which the next step's are made by a thread while the current step computes.

    A draw is a function of (seed, step, position). What was prefetched and is not asked for (the run resumed at another
    step) is dropped, and what was not prefetched is drawn at once: both are the same numbers.

    Args:
        draw: `draw` with its other arguments bound: `(step, positions, pin=...) -> RandomDraws`.
    """

    def __init__(self, draw: Callable[..., RandomDraws]) -> None:
        self._draw = draw
        self._ready: dict[tuple[int, bytes], Future[RandomDraws]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, step: int, positions: Tensor, pin: bool = False) -> RandomDraws:
        """The draws of these positions of a step."""
        # The thread starts with the first call: a forked rank would not inherit one that its parent had started.
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="draws")
        key = positions.numpy().tobytes()
        # Draws of steps that lie behind are never asked for again, and would stay in memory.
        for stale in [entry for entry in self._ready if entry[0] < step]:
            self._ready.pop(stale).cancel()
        ready = self._ready.pop((step, key), None)
        # Queued before this step's draws are waited for, so that the thread never idles.
        if (step + 1, key) not in self._ready:
            self._ready[step + 1, key] = self._pool.submit(self._draw, step + 1, positions, pin=pin)
        return self._draw(step, positions, pin=pin) if ready is None else ready.result()


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of one sampled image: its initial noise first, then one draw a step. Always on the CPU.

    A CPU generator keeps only 32 bits of its seed. The mapping below is one-to-one in `index` for each `seed`, so two
    images of a run never share their noise. Hashing to random 32-bit seeds would make 50,000 images share one pair in
    one run out of four.
    """
    # The seed shifts the whole sequence, so that image i of two seeds has different noise.
    offset = int.from_bytes(hashlib.blake2b(f"fine_dist.sample {seed}".encode(), digest_size=4).digest(), "little")
    x = (index + offset) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finalizer of MurmurHash3, a bijection
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    generator = torch.Generator()
    generator.manual_seed(x ^ (x >> 16))
    return generator
