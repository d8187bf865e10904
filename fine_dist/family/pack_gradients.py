"""Losses and gradients of a pack's step: some jobs at a time, in chunks that shrink when memory runs out.

Shapes: J jobs, J' of one chunk, B samples of a job on this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fine_dist.core.errors import is_out_of_memory
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.optimizer import precision
from fine_dist.engine.settings import LoopConfig
from fine_dist.family.pack_feed import FeedBatch
from fine_dist.family.pack_model import PackedDiT, PackInputs


class PackGradients:
    """`gradients(batch, feed_of) -> losses [J]` of a step, with the gradients in the pack's parameters.

    Args:
        pack: Parameters and forward pass of J jobs.
        zero_grad: Clears the gradients; called before every attempt.
        diffusion: The process that the jobs are trained for.
        engine: Arithmetic and checkpointing.
        device: Where the pack is.
        chunk: Jobs that go through the model at once. It is halved whenever a step runs out of memory.
        micro_batch: Samples of a job that go through the model at once.
    """

    def __init__(
        self,
        pack: PackedDiT,
        zero_grad: Callable[[], None],
        diffusion: DiffusionConfig,
        engine: LoopConfig,
        device: torch.device,
        chunk: int,
        micro_batch: int,
    ) -> None:
        self.pack, self.zero_grad, self.engine, self.device = pack, zero_grad, engine, device
        self.chunk, self.micro_batch = chunk, micro_batch
        self.too_large: set[int] = set()
        """Jobs whose batch does not fit into memory even alone."""
        self._objective = Objective(diffusion, pack.arch, 0)
        self._objective.process.to(device)

    def __call__(self, batch: FeedBatch | None, feed_of: dict[int, int]) -> Tensor:
        """Losses [J] of the jobs on this process; their gradients are added to the parameters.

        The loss is NaN for a job whose data this process could not read, and for one whose batch does not fit into
        memory even alone: every process then ends it in the same step.

        Args:
            batch: A step of the feeds. None: no feed could be read.
            feed_of: The jobs of this step, and the feed of each.
        """
        rows = {j: batch.rows[feed] for j, feed in feed_of.items() if feed in batch.rows} if batch is not None else {}
        while True:
            self.zero_grad()
            fits = [j for j in feed_of if j in rows and j not in self.too_large]
            losses = torch.zeros(len(self.pack.depths), device=self.device)
            if missing := sorted(feed_of.keys() - set(fits)):
                losses.index_fill_(0, self.pack.index.tensor(missing, self.device), math.nan)
            # Chunks of nearly equal size: a small last chunk would launch as many kernels as a full one.
            size = math.ceil(len(fits) / math.ceil(len(fits) / self.chunk)) if fits else 1
            part: list[int] = []
            try:
                for start in range(0, len(fits), size):
                    part = fits[start : start + size]
                    assert batch is not None
                    losses.index_copy_(
                        0,
                        self.pack.index.tensor(part, self.device),
                        self._backward(batch.select(self.pack.index, [rows[j] for j in part]), part),
                    )
                return losses
            # The gradients of this attempt are discarded and the complete step is computed again with smaller chunks,
            # so that no partial sum counts twice.
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if len(part) == 1:
                # The job does not fit even alone: its loss becomes NaN, which ends it on all ranks.
                self.too_large.add(part[0])
            self.chunk = max(1, len(part) // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _backward(self, batch: FeedBatch, jobs: list[int]) -> Tensor:
        """Mean losses [J'] and gradients of some jobs, one micro-batch at a time. `batch` has one row for each job."""
        total = torch.zeros(len(jobs), device=self.device)
        noised, samples = batch.noised, batch.noised.t.shape[1]
        for start in range(0, samples, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            with precision(self.engine, self.device):
                out = self.pack(PackInputs(noised.z_t[:, part], noised.t[:, part], noised.y[:, part]), jobs)
            losses = self._objective.losses(batch.flat(part), out.flatten(0, 1)).unflatten(0, (len(jobs), -1))
            # With one micro-batch the expression is that of the engine's loop, so that the bits are equal.
            means = losses.mean(1) if self.micro_batch == samples else losses.sum(1) / samples  #               [J']
            # The sum over jobs gives each job's parameters the gradient of its own mean only.
            means.sum().backward()
            total += means.detach()
        return total
