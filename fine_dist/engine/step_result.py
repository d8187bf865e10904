"""The numbers of a step: reduced over ranks on the device, copied to the host in the background, read one step later.

A host that reads a number from an accelerator waits for all work queued before it, and then the accelerator waits until
the host has queued work again. A step's numbers therefore stay on the device, where they decide whether the update is
applied, and the host reads them while the device computes the next step.

Shapes: W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fine_dist.engine.dist import all_reduce_sum
from fine_dist.engine.world import World


def reduce_flags(total: Tensor, stop_request: int, world: World, terms: Tensor | None = None) -> Tensor:
    """Reduce everything that ranks must agree on in one small message per step; the host does not wait for it.

    Args:
        total: The sum of this rank's losses, fp64 [], on the device.
        stop_request: This rank's request (`stopping.GO_ON`, `SAVE` or `STOP`).
        world: Rank and world size of this process.
        terms: Sums of this rank's loss terms, fp64 [K]; None: K is 0.

    Returns:
        fp64 [1 + 2W + K]: the sum of all ranks' losses, a 1 for every rank whose own losses are not finite, the stop
        request of every rank, and the sums of the terms.
    """
    # One sum over ranks is enough: each rank writes its flags into entries that are zero on
    # all others, so that the sum is a gather. fp64 represents the integers exactly.
    flags = torch.zeros(1 + 2 * world.world_size, dtype=torch.float64, device=total.device)
    flags[0] = total
    # Written by the device. An `if` here would make the host wait for the loss.
    flags[1 + world.rank] = ~total.isfinite()
    flags[1 + world.world_size + world.rank].fill_(stop_request)
    flags = flags if terms is None else torch.cat([flags, terms])
    return all_reduce_sum(flags, world)


class AsyncHostCopy:
    """An asynchronous copy of device values, fp64 [N], to the host.

    The copy needs page-locked memory to be asynchronous, and the event marks the point in the queue after which it is
    complete: waiting for the event waits for nothing that was queued later.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Wait for the copy and return the values."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(value) for value in self._values.tolist()]


@dataclass(frozen=True)
class StepResult:
    """The numbers of a finished step, the same on every rank."""

    loss: float
    """Mean over the samples of all ranks."""
    bad_ranks: list[int]
    """Ranks whose own losses are not finite."""
    stop_request: int
    """The strongest request of all ranks (`stopping`)."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    terms: list[float]
    """Means of the loss terms over the samples of all ranks."""

    @property
    def problem(self) -> str:
        """Why the step is not finite, or an empty string."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss} on rank {', '.join(map(str, self.bad_ranks))}"
        return "" if math.isfinite(self.grad_norm) else f"the gradient norm is {self.grad_norm}"


@dataclass(frozen=True)
class PendingStep:
    """A step whose update is queued on the device and whose numbers the host has not yet read."""

    step: int
    """Updates before this one."""
    lr: float
    waited_s: float
    """Seconds that this rank waited for the step's data."""
    damaged: int
    """Damaged samples that this rank's stream has skipped since it was opened."""
    numbers: AsyncHostCopy
    """`reduce_flags`' values, followed by the gradient norm."""

    def read(self, world: World, global_batch: int) -> StepResult:
        """Wait for this step, but not for work that was queued after it."""
        total, *flags, grad_norm = self.numbers.read()
        ranks = world.world_size
        bad_ranks = [rank for rank, flag in enumerate(flags[:ranks]) if flag]
        # One row of floats, cut in the order in which `reduce_flags` has put them.
        terms = [value / global_batch for value in flags[2 * ranks :]]
        return StepResult(total / global_batch, bad_ranks, int(max(flags[ranks : 2 * ranks])), grad_norm, terms)
