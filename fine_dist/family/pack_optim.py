"""AdamW and gradient clipping for many jobs at once, elementwise on stacked parameters, with a learning rate per job.

Shapes: J jobs; every parameter is [J, ...], row j belonging to job j; N numbers of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_dist.engine.settings import OptimConfig


class PackedAdamW:
    """`torch.optim.AdamW` after `clip_grad_norm_`, separately for every job.

    The operations on a job's rows are those of torch's AdamW, in the same order: decay, moments, bias correction with
    the job's number of updates, a step with the job's learning rate. A mask on the device decides which jobs are
    updated, so the host never waits, and the number of kernels does not depend on the number of jobs.

    Args:
        parameters: Leaf tensors [J, ...].
        jobs: J.
        config: Settings of AdamW; the learning rates are given to `step`.
    """

    def __init__(self, parameters: Sequence[Tensor], jobs: int, config: OptimConfig):
        self.parameters = list(parameters)
        self.jobs, self.config = jobs, config
        self.first = [torch.zeros_like(self._rows(p)) for p in self.parameters]
        self.second = [torch.zeros_like(self._rows(p)) for p in self.parameters]
        device = self.parameters[0].device
        self.updates = torch.zeros(jobs, dtype=torch.float64, device=device)
        """Number of updates of each job, [J]."""
        self._norms = torch.zeros(jobs, device=device)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(self.jobs, -1)  #                                                       [J, N]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The gradient norm of every job, float32 [J]; the next `step` clips by it."""
        squares = [self._rows(p.grad).square().sum(1) for p in self.parameters if p.grad is not None]
        self._norms = torch.stack(squares).sum(0).sqrt() if squares else torch.zeros_like(self._norms)
        return self._norms

    @torch.no_grad()
    def step(self, update: Tensor, rates: Tensor) -> None:
        """Update some jobs, after `norms`; gradients above `clip_norm` are clipped.

        Args:
            update: bool [J]: the jobs that are updated. Rows of the other jobs keep their bits, whatever their
                gradients.
            rates: Learning rates of this step, float64 [J].
        """
        beta1, beta2 = self.config.betas
        keep = update[:, None]  #                                                                               [J, 1]
        # Counted on the device, where the mask is.
        self.updates += update
        # bias corrections in fp64, as torch.optim computes them on the host
        size = (rates / (1 - beta1**self.updates)).float()[:, None]
        correction = (1 - beta2**self.updates).sqrt().float()[:, None]
        decay = (1 - update * rates * self.config.weight_decay).float()[:, None]
        weight = ((1 - beta1) * update).float()[:, None]
        # A job that is not updated multiplies its moments by 1 and adds 0, which leaves every bit as it is.
        shrink = torch.where(keep, beta2, 1.0)
        scale = None
        if self.config.clip_norm is not None:
            # As in `clip_grad_norm_`, including the 1e-6.
            scale = (self.config.clip_norm / (self._norms + 1e-6)).clamp(max=1.0)[:, None]
        for p, first, second in zip(self.parameters, self.first, self.second):
            if p.grad is None:
                continue
            value, grad = self._rows(p), self._rows(p.grad)
            # `where` and not a product with the mask: 0 times NaN is NaN, and must not reach the job's moments.
            grad = torch.where(keep, grad if scale is None else grad * scale, 0.0)
            if self.config.weight_decay:
                value.mul_(decay)
            first.lerp_(grad, weight)
            second.mul_(shrink).addcmul_(grad, grad, value=1 - beta2)
            # In the order of torch's AdamW, so that a job gives the same result alone and in a pack, up to rounding.
            change = size * (first / (second.sqrt() / correction).add_(self.config.eps))
            value.sub_(torch.where(keep, change, 0.0))

    # --- the state of one job ---------------------------------------------------------------------------------------

    def state(self, job: int) -> dict[str, Tensor]:
        """A job's parameters and moments as flat tensors in host memory."""
        parts = {"value": [self._rows(p) for p in self.parameters], "first": self.first, "second": self.second}
        return {f"{part}{i}": x[job].cpu().clone() for part, xs in parts.items() for i, x in enumerate(xs)}

    @torch.no_grad()
    def restore(self, job: int, state: dict[str, Tensor], updates: int) -> None:
        """Restore what `state` returned, and the job's number of updates.

        Packs of another depth have rows of another length; a row is zero beyond the job's own depth.
        """
        self.updates[job] = updates
        parts = {"value": [self._rows(p) for p in self.parameters], "first": self.first, "second": self.second}
        for part, xs in parts.items():
            for i, x in enumerate(xs):
                saved = state[f"{part}{i}"].to(x)
                size = min(len(saved), x.shape[1])
                x[job].zero_()
                x[job, :size] = saved[:size]
