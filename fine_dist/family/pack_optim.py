"""AdamW and gradient clipping for many jobs at once: elementwise on stacked parameters, a learning rate a job.

Shapes: J jobs; every parameter is [J, ...], row j belonging to job j; N numbers of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fine_dist.engine.settings import OptimConfig


class PackedAdamW:
    """`torch.optim.AdamW` after `clip_grad_norm_`, for every job by itself.

    A job's rows see exactly the operations of its solo optimiser, in the same order: decay, moments, bias correction
    with the job's own number of updates, step with the job's own rate. Jobs that are not named are not touched.

    parameters: leaf tensors [J, ...]; a job alone may give its own parameters of any shape.
    """

    def __init__(self, parameters: Sequence[Tensor], jobs: int, config: OptimConfig):
        self.parameters = list(parameters)
        self.jobs, self.config = jobs, config
        self.first = [torch.zeros_like(self._rows(p)) for p in self.parameters]
        self.second = [torch.zeros_like(self._rows(p)) for p in self.parameters]
        self.updates = [0] * jobs
        self._norms = torch.zeros(jobs)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(self.jobs, -1)  #                                                       [J, N]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The norm of every job's gradient, float32 [J]; what the next `step` clips by."""
        squares = torch.zeros(self.jobs, device=self.parameters[0].device)
        for p in self.parameters:
            if p.grad is not None:
                squares += self._rows(p.grad).square().sum(1)
        self._norms = squares.sqrt()
        return self._norms

    @torch.no_grad()
    def step(self, jobs: Sequence[int], rates: Sequence[float]) -> None:
        """Update these jobs, each with its own learning rate, after `norms`; clip gradients above `clip_norm`."""
        beta1, beta2 = self.config.betas
        everyone = list(jobs) == list(range(self.jobs))
        rows = slice(None) if everyone else torch.tensor(list(jobs), device=self._norms.device)
        for j in jobs:
            self.updates[j] += 1
        table = torch.tensor(
            [
                (
                    1 - rate * self.config.weight_decay,
                    rate / (1 - beta1 ** self.updates[j]),
                    math.sqrt(1 - beta2 ** self.updates[j]),
                )
                for j, rate in zip(jobs, rates)
            ],
            device=self._norms.device,
        )
        decay, size, correction = table[:, :, None].unbind(1)  #                                          3 x [J', 1]
        scale = None
        if self.config.clip_norm is not None:
            scale = (self.config.clip_norm / (self._norms[rows] + 1e-6)).clamp(max=1.0)[:, None]
        for p, m, v in zip(self.parameters, self.first, self.second):
            if p.grad is None:
                continue
            whole = (self._rows(p), m, v)
            value, one, two = (x[rows] for x in whole)
            grad = self._rows(p.grad)[rows]
            if scale is not None:
                grad = grad * scale
            if self.config.weight_decay:
                value.mul_(decay)
            one.lerp_(grad, 1 - beta1)
            two.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            value.sub_(size * (one / (two.sqrt() / correction).add_(self.config.eps)))
            if not everyone:
                for target, part in zip(whole, (value, one, two)):
                    target[rows] = part

    # --- a job's part -----------------------------------------------------------------------------------------------

    def state(self, job: int) -> dict[str, Tensor]:
        """A job's values and moments, flat, in host memory."""
        parts = {"value": [self._rows(p) for p in self.parameters], "first": self.first, "second": self.second}
        return {f"{part}{i}": x[job].cpu().clone() for part, xs in parts.items() for i, x in enumerate(xs)}

    @torch.no_grad()
    def restore(self, job: int, state: dict[str, Tensor], updates: int) -> None:
        """Put back what `state` gave, and how often the job was updated.

        A shallower pack has shorter rows: what a longer row holds beyond a job's own depth is zero.
        """
        self.updates[job] = updates
        parts = {"value": [self._rows(p) for p in self.parameters], "first": self.first, "second": self.second}
        for part, xs in parts.items():
            for i, x in enumerate(xs):
                saved = state[f"{part}{i}"].to(x)
                size = min(len(saved), x.shape[1])
                x[job].zero_()
                x[job, :size] = saved[:size]
