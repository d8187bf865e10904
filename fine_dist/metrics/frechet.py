"""The Fréchet distance between two Gaussians (Dowson and Landau, 1982), as FID uses it.

    d² = |mu_1 - mu_2|² + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^½

Shapes: F features. No matrix square root is computed. With symmetric eigendecompositions S_i = L_i L_iᵀ, the product
S_1 S_2 has the eigenvalues of (L_1ᵀ L_2)(L_1ᵀ L_2)ᵀ, so the last trace is the sum of the singular values of L_1ᵀ L_2:
real and non-negative by construction, exact for singular covariances (fewer samples than features), where `sqrtm`
returns complex noise and needs an offset on the diagonal. Directions without variance drop out of L_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fine_dist.errors import DataError
from fine_dist.metrics.moments import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared distance d² (what is called FID), never negative. `DataError` for fewer than 2 samples in a or b."""
    return frechet_from(a.mean, a.covariance(), b.mean, b.covariance())


def frechet_from(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """d² from means [F] and covariances [F, F], for reference statistics that come as arrays. Computed in float64."""
    mean_a, cov_a, mean_b, cov_b = (x.detach().cpu().double() for x in (mean_a, cov_a, mean_b, cov_b))
    num = len(mean_a)
    if len(mean_b) != num or cov_a.shape != (num, num) or cov_b.shape != (num, num):
        raise DataError(
            f"statistics do not fit: means {list(mean_a.shape)}, {list(mean_b.shape)}, covariances "
            f"{list(cov_a.shape)}, {list(cov_b.shape)}; both must come from the same features"
        )
    if not all(torch.isfinite(x).all() for x in (mean_a, cov_a, mean_b, cov_b)):
        raise DataError("a mean or covariance has NaN or infinite entries")
    gap = mean_a - mean_b
    cross = torch.linalg.svdvals(_root(cov_a).T @ _root(cov_b)).sum()
    return max(0.0, float(gap @ gap + cov_a.trace() + cov_b.trace() - 2 * cross))


def _root(cov: Tensor) -> Tensor:
    """L [F, k] with L Lᵀ = cov, k its numerical rank."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    floor = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    if values.min() < -max(float(floor) * 100, 1e-12):
        raise DataError(
            f"not a covariance: its smallest eigenvalue is {values.min():.3g}, the largest {values.max():.3g}"
        )
    keep = values > floor
    return vectors[:, keep] * values[keep].sqrt()
