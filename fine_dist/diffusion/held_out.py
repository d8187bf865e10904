"""The held-out noise-prediction loss: the very same questions for every model.

Shapes: B batch, C latent channels, H latent side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fine_dist.diffusion.process import NoiseSchedule, mix
from fine_dist.diffusion.settings import DiffusionConfig

ENOUGH = 10_000
"""Questions beyond which more of each sample only take longer."""


class HeldOutLoss:
    """Held-out noise-prediction loss at fixed timesteps and noise: `measure(model) -> {"held_out_loss": float}`.

    Every sample is measured at one to four timesteps, as many as make `ENOUGH` questions, spread evenly over the chain,
    with its own fixed noise and its true label, so that two models are compared on the very same questions.
    """

    def __init__(self, latents: Tensor, labels: Tensor, config: DiffusionConfig, seed: int = 0):
        self.schedule = NoiseSchedule(config)
        self.samples = n = len(latents)
        shape = latents.shape[1:]
        per_sample = min(4, max(1, ENOUGH // n))
        generator = torch.Generator().manual_seed(mix(seed, 0x4E1D))
        stratum = torch.arange(n * per_sample).double()
        self.t = ((stratum + 0.5) / (n * per_sample) * config.num_timesteps).long()
        order = torch.randperm(n * per_sample, generator=generator)
        self.z = latents.repeat(per_sample, 1, 1, 1)[order]
        self.y = labels.repeat(per_sample)[order]
        self.eps = torch.randn(n * per_sample, *shape, generator=generator)

    @torch.no_grad()
    def __call__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor], batch: int = 256) -> dict[str, float]:
        device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
        total, count = self.sums(model, device, batch, 0, 1)
        return {"held_out_loss": total / count}

    @torch.no_grad()
    def sums(
        self, model: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, batch: int, rank: int, size: int
    ) -> tuple[float, int]:
        """(sum of losses, how many) of rank's share of the questions: whole batches, dealt out in turn.

        The batches are those of one process, so that the sums over all ranks are its sums up to their order.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        self.schedule.to(device)
        for start in range(rank * batch, len(self.t), batch * size):
            z, y, t, eps = (x[start : start + batch].to(device) for x in (self.z, self.y, self.t, self.eps))
            out = model(self.schedule.add_noise(z, t, eps), t, y)[:, : z.shape[1]].float()
            total += (out - eps).square().flatten(1).mean(1).double().sum().cpu()
            count += len(t)
        return float(total), count
