"""AdamW and gradient clipping for many jobs at once: elementwise on stacked parameters, a learning rate a job.

Shapes: J jobs; every parameter is [J, ...], row j belonging to job j; N numbers of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_dist.engine.settings import OptimConfig


class PackedAdamW:
    """`torch.optim.AdamW` after `clip_grad_norm_`, for every job by itself.

    A job's rows see the operations of its solo optimizer, in the same order: decay, moments, bias correction with the
    job's own number of updates, step with the job's own rate. Which jobs are updated is decided by a mask on the
    device, so nothing waits for a number, and the number of kernels does not depend on the number of jobs.

    parameters: leaf tensors [J, ...].
    """

    def __init__(self, parameters: Sequence[Tensor], jobs: int, config: OptimConfig):
        self.parameters = list(parameters)
        self.jobs, self.config = jobs, config
        self.first = [torch.zeros_like(self._rows(p)) for p in self.parameters]
        self.second = [torch.zeros_like(self._rows(p)) for p in self.parameters]
        device = self.parameters[0].device
        self.updates = torch.zeros(jobs, dtype=torch.float64, device=device)
        """Updates that each job has had, [J]."""
        self._norms = torch.zeros(jobs, device=device)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(self.jobs, -1)  #                                                       [J, N]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The norm of every job's gradient, float32 [J]; what the next `step` clips by."""
        squares = [self._rows(p.grad).square().sum(1) for p in self.parameters if p.grad is not None]
        self._norms = torch.stack(squares).sum(0).sqrt() if squares else torch.zeros_like(self._norms)
        return self._norms

    @torch.no_grad()
    def step(self, update: Tensor, rates: Tensor) -> None:
        """Update some jobs, after `norms`; gradients above `clip_norm` are clipped.

        Args:
            update: bool [J]: the jobs that are updated. Rows of the others keep their bits, whatever gradients they
                have.
            rates: Learning rates of this step, float64 [J].
        """
        beta1, beta2 = self.config.betas
        keep = update[:, None]  #                                                                               [J, 1]
        self.updates += update
        # bias corrections in fp64, as torch.optim computes them on the host
        size = (rates / (1 - beta1**self.updates)).float()[:, None]
        correction = (1 - beta2**self.updates).sqrt().float()[:, None]
        decay = (1 - update * rates * self.config.weight_decay).float()[:, None]
        weight = ((1 - beta1) * update).float()[:, None]
        shrink = torch.where(keep, beta2, 1.0)
        scale = None
        if self.config.clip_norm is not None:
            scale = (self.config.clip_norm / (self._norms + 1e-6)).clamp(max=1.0)[:, None]
        for p, first, second in zip(self.parameters, self.first, self.second):
            if p.grad is None:
                continue
            value, grad = self._rows(p), self._rows(p.grad)
            grad = torch.where(keep, grad if scale is None else grad * scale, 0.0)
            if self.config.weight_decay:
                value.mul_(decay)
            first.lerp_(grad, weight)
            second.mul_(shrink).addcmul_(grad, grad, value=1 - beta2)
            change = size * (first / (second.sqrt() / correction).add_(self.config.eps))
            value.sub_(torch.where(keep, change, 0.0))

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
