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
    """Random numbers of a step: times [B] as the model gets them, noise [B, C, H, H], dropped labels [B] bool."""

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
    """Draw the random numbers of some positions of a step's global batch.

    Each position has its own seed, so its numbers do not depend on the other positions.

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
        # In fp64, because quantile functions of times magnify the rounding of a uniform number. Both numbers are always
        # drawn, so that the noise after them does not depend on `label_drop`.
        time, chance = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        uniform.append(time)
        dropped.append(chance < label_drop)
        values.normal_(generator=generator)
    t = times(uniform)
    return RandomDraws(t.pin_memory() if pin else t, noise, torch.tensor(dropped, dtype=torch.bool, pin_memory=pin))


class PrefetchedDraws:
    """Random numbers of steps; a thread draws those of the next step while the current step computes.

    They are a function of (seed, step, position), so prefetching does not change them: a prefetched step that is not
    requested (the run resumed elsewhere) is dropped, and a step that was not prefetched is drawn immediately.

    Args:
        draw: `draw` with its other arguments bound: `(step, positions, pin=...) -> RandomDraws`.
    """

    def __init__(self, draw: Callable[..., RandomDraws]) -> None:
        self._draw = draw
        self._ready: dict[tuple[int, bytes], Future[RandomDraws]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, step: int, positions: Tensor, pin: bool = False) -> RandomDraws:
        """The random numbers of these positions of a step."""
        # The thread starts with the first call, because a forked rank does not inherit the threads of its parent.
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="draws")
        key = positions.numpy().tobytes()
        # Earlier steps are never requested again and would stay in memory.
        for stale in [entry for entry in self._ready if entry[0] < step]:
            self._ready.pop(stale).cancel()
        ready = self._ready.pop((step, key), None)
        # Submitted before waiting for this step's numbers, so that the thread never idles.
        if (step + 1, key) not in self._ready:
            self._ready[step + 1, key] = self._pool.submit(self._draw, step + 1, positions, pin=pin)
        return self._draw(step, positions, pin=pin) if ready is None else ready.result()


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator of one sampled image, on the CPU: first its initial noise, then the noise of each step.

    A CPU generator keeps only 32 bits of its seed. The mapping below is one-to-one in `index` for each `seed`, so two
    images of a run never share their noise. Hashing to random 32-bit seeds would make 50,000 images share one pair in
    one run out of four.
    """
    # The seed shifts the sequence, so that image i has different noise under different seeds.
    offset = int.from_bytes(hashlib.blake2b(f"fine_dist.sample {seed}".encode(), digest_size=4).digest(), "little")
    x = (index + offset) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finalizer of MurmurHash3, a bijection
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    generator = torch.Generator()
    generator.manual_seed(x ^ (x >> 16))
    return generator
