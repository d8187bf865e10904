"""What a step came to: agreed by all ranks where it was computed, and read by the host when it can be had for nothing.

A host that asks an accelerator for a number waits until everything before it is done, and the accelerator then waits
until the host has given it work again. So a step's numbers stay on the device, where they decide by themselves whether
the step counts; a copy of them is on its way to the host meanwhile.

Shapes: W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_dist.engine.dist import World, all_reduce_sum


def agree(total: Tensor, wish: int, world: World) -> Tensor:
    """One small all-reduce a step, fp64 [1 + 2W]: the sum of all ranks' losses, who is bad, and what each wishes.

    total: fp64 [], the sum of this rank's losses, on the device that the answer is on. The host waits for nothing.
    """
    words = torch.zeros(1 + 2 * world.world_size, dtype=torch.float64, device=total.device)
    words[0] = total
    words[1 + world.rank] = ~total.isfinite()
    words[1 + world.world_size + world.rank].fill_(wish)
    return all_reduce_sum(words, world)


class Later:
    """Values of the device, fp64 [N], that are copied to the host while both go on."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The values, when the device has come to where they were made: what was queued after them may be under way."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


@dataclass(frozen=True)
class Outcome:
    """A finished step, as every rank knows it."""

    loss: float
    """Mean over the samples of all ranks."""
    bad_ranks: list[int]
    """Those whose own losses are not finite."""
    wish: int
    """The greatest of all ranks (`stopping`)."""
    grad_norm: float

    @property
    def what(self) -> str:
        """What is bad about it; nothing for a good step."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss} on rank {', '.join(map(str, self.bad_ranks))}"
        return "" if math.isfinite(self.grad_norm) else f"the gradient norm is {self.grad_norm}"


@dataclass(frozen=True)
class Taken:
    """A step whose update is given to the device: what the host knows of it, and the numbers that are under way.

    step: updates before this one. lr, waited_s, damaged: as `Monitor.step` takes them.
    """

    step: int
    lr: float
    waited_s: float
    damaged: int
    numbers: Later
    """`agree`'s words, and the gradient norm."""

    def read(self, world: World, global_batch: int) -> Outcome:
        """Wait for this step alone."""
        total, *words, grad_norm = self.numbers.read()
        bad, wishes = words[: world.world_size], words[world.world_size :]
        bad_ranks = [rank for rank, word in enumerate(bad) if word]
        return Outcome(total / global_batch, bad_ranks, int(max(wishes)), grad_norm)
