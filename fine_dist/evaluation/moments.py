"""Mean and covariance of features, streamed in float64 and merged over processes.

Shapes: N samples of one call, F features. The merge is Chan, Golub and LeVeque's (1983): sums of squares are kept
about the mean, never about zero, so that nothing cancels however far from zero the features lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fine_dist.core.errors import DataError


@dataclass
class Moments:
    """Count, mean [F] and centered sum of outer products [F, F], all float64. Start with `Moments.empty(F)`."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, num_features: int) -> Moments:
        return cls(0, torch.zeros(num_features, dtype=torch.float64), torch.zeros(num_features, num_features).double())

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features [N, F]. `DataError` when one is NaN or infinite."""
        x = features.detach().cpu().double()
        if x.ndim != 2:
            raise ValueError(f"features must be [N, F], not {list(x.shape)}")
        if not torch.isfinite(x).all():
            rows = (~torch.isfinite(x).all(dim=1)).nonzero().flatten()
            raise DataError(f"features of {len(rows)} of {len(x)} samples are NaN or infinite (first: {int(rows[0])})")
        mean = x.mean(dim=0) if len(x) else x.new_zeros(x.shape[1])
        # About the mean of this batch: sums of squares about zero lose all digits where the mean is far from it.
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def update(self, features: Tensor) -> Moments:
        """Add features [N, F] of any float dtype; returns itself."""
        return self.merge(Moments.of(features))

    def merge(self, other: Moments) -> Moments:
        """Add what another process or batch has seen; returns itself."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and {len(other.mean)} features cannot be merged")
        total = self.count + other.count
        if other.count:
            gap = other.mean - self.mean
            self.scatter = self.scatter + other.scatter
            # What the two means' distance adds to the joint scatter
            # (Chan, Golub and LeVeque, eq. 2.1b), without another pass.
            self.scatter.addr_(gap, gap, alpha=self.count * other.count / total)
            self.mean = self.mean + gap * (other.count / total)
            self.count = total
        return self

    def all_reduce(self, device: torch.device | str = "cpu") -> Moments:
        """Merge over all processes of the default group, if there is one; every process returns the same result.

        Two reductions, of F and of F x F numbers: the mean of all first, then every process's scatter about *that*
        mean, which is Chan's merge for any number of parts.

        Args:
            device: Device on which the group communicates (NCCL needs the GPU).
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        sums = torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]).to(device)
        dist.all_reduce(sums)
        total = int(sums[-1].item())
        # Every process now has the same mean, about which scatters may simply be added.
        mean = (sums[:-1] / max(total, 1)).cpu()
        gap = self.mean - mean
        scatter = (self.scatter + torch.outer(gap, gap) * self.count).to(device)
        dist.all_reduce(scatter)
        self.count, self.mean, self.scatter = total, mean, scatter.cpu()
        return self

    def covariance(self) -> Tensor:
        """[F, F] float64, the unbiased one (divided by N - 1, as `numpy.cov`). `DataError` for fewer than 2 samples."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 samples, not {self.count}")
        return self.scatter / (self.count - 1)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a safetensors file; `Moments.from_state` is the way back."""
        return {"count": torch.tensor([self.count]), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        return cls(int(state["count"][0]), state["mean"].double(), state["scatter"].double())
