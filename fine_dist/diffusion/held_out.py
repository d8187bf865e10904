"""The held-out loss: every model is measured on the same samples, times and noise.

Shapes: B batch, C latent channels, H latent side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fine_dist.core.seeds import mix
from fine_dist.diffusion.process import arithmetic, make_process
from fine_dist.diffusion.settings import DiffusionConfig, Precision

NUM_PAIRS = 10_000
"""Number of (sample, time) pairs above which further times of each sample change the mean little."""


class HeldOutLoss:
    """Mean squared error of the model's prediction at fixed times and noise: `loss(model) -> {"held_out_loss": float}`.

    Every sample is measured at one to four times, for about `NUM_PAIRS` pairs. The times are evenly spaced quantiles of
    the distribution of training times, and each pair has its own fixed noise and its true label, so that all models are
    compared on identical inputs. Samples are not weighted.

    Args:
        latents: Clean latents [N, C, H, H].
        labels: Class labels [N].
        config: The process; models of different processes have losses that cannot be compared.
        seed: Seeds the noise.
    """

    def __init__(self, latents: Tensor, labels: Tensor, config: DiffusionConfig, seed: int = 0):
        self.process = make_process(config)
        self.samples = n = len(latents)
        shape = latents.shape[1:]
        per_sample = min(4, max(1, NUM_PAIRS // n))
        generator = torch.Generator().manual_seed(mix(seed, 0x4E1D))
        stratum = torch.arange(n * per_sample).double()
        # Quantiles instead of random times: a stratified sample has far less variance for the same cost.
        self.t = self.process.times(((stratum + 0.5) / (n * per_sample)).tolist())
        # Without a permutation the first samples would always have the cleanest times.
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
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        device: torch.device,
        batch: int,
        rank: int,
        size: int,
        precision: Precision = "fp32",
    ) -> tuple[float, int]:
        """(sum of losses, number of pairs) of one rank's share: every `size`-th batch.

        The batches are those of a single process, so the sum over all ranks equals its sum up to the order of terms.
        `precision` is the arithmetic of the model; the loss is computed in float32 and summed in float64.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        self.process.to(device)
        # Ranks take complete batches in turn: on any number of ranks a batch has the same content and rounding.
        for start in range(rank * batch, len(self.t), batch * size):
            z, y, t, eps = (x[start : start + batch].to(device) for x in (self.z, self.y, self.t, self.eps))
            with arithmetic(precision, device):
                out = model(self.process.add_noise(z, t, eps), t, y)[:, : z.shape[1]].float()
            total += (out - self.process.target(z, t, eps)).square().flatten(1).mean(1).double().sum().cpu()
            count += len(t)
        return float(total), count
