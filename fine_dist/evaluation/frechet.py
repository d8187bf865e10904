"""The Fréchet distance between two Gaussians (Dowson and Landau, 1982), as FID uses it.

    d² = |mu_1 - mu_2|² + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^½

Shapes: F features. No matrix square root is computed: the last trace is the sum of the square roots of the eigenvalues
of S_1 S_2, which are computed in one of two ways.

- The fast way, for regular covariances: with the Cholesky factor S_1 = L Lᵀ, they are the eigenvalues of the symmetric
  Lᵀ S_2 L, and eigenvalues alone cost a fraction of eigenvectors. Each is accurate to eps times the largest, so that
  the error of the sum is bounded by eps λ_max Σ 1 / (2 √λ).
- The robust way, if that error is not small (fewer samples than features): with S_i = R_i R_iᵀ from symmetric
  eigendecompositions, the square roots are the singular values of R_1ᵀ R_2.

Statistics that were stored in float32 may have eigenvalues slightly below zero instead of zero. The tolerance follows
from the dtype of the input.
"""

from __future__ import annotations

import torch
from scipy.linalg.lapack import dsygst
from torch import Tensor

from fine_dist.core.errors import DataError
from fine_dist.evaluation.moments import Moments

_ACCURACY = 1e-7
"""Error of the trace, relative to tr S_1 + tr S_2, up to which the fast result is used."""


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared distance d² (called FID), never negative. `DataError` for fewer than 2 samples in a or b."""
    return frechet_from(a.mean, a.covariance(), b.mean, b.covariance())


def frechet_from(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """d² from means [F] and covariances [F, F], for reference statistics that come as arrays. Computed in float64.

    Give them in the dtype in which they were stored, which determines the tolerance. `DataError` when they do not fit
    each other, are not finite, or a covariance has negative eigenvalues.
    """
    num = len(mean_a)
    if len(mean_b) != num or cov_a.shape != (num, num) or cov_b.shape != (num, num):
        raise DataError(
            f"statistics do not fit: means {list(mean_a.shape)}, {list(mean_b.shape)}, covariances "
            f"{list(cov_a.shape)}, {list(cov_b.shape)}; both must come from the same features"
        )
    if not all(torch.isfinite(x).all() for x in (mean_a, cov_a, mean_b, cov_b)):
        raise DataError("a mean or covariance has NaN or infinite entries")
    # Read before the conversion to fp64, which hides that the numbers were rounded to fp32.
    exact = tuple(torch.finfo(cov.dtype).eps for cov in (cov_a, cov_b))
    mean_a, cov_a, mean_b, cov_b = (x.detach().cpu().double() for x in (mean_a, cov_a, mean_b, cov_b))
    # Symmetric but for rounding; eigensolvers read one triangle only.
    cov_a, cov_b = (cov_a + cov_a.T) / 2, (cov_b + cov_b.T) / 2
    gap = mean_a - mean_b
    traces = float(cov_a.trace() + cov_b.trace())
    cross = _fast_trace(cov_a, cov_b, traces)
    if cross is None:
        cross = float(torch.linalg.svdvals(_root(cov_a, exact[0]).T @ _root(cov_b, exact[1])).sum())
    # For two equal sets the result is rounding error, which may be negative.
    return max(0.0, float(gap @ gap) + traces - 2 * cross)


def _fast_trace(cov_a: Tensor, cov_b: Tensor, traces: float) -> float | None:
    """tr (S_1 S_2)^½ by a Cholesky factor and eigenvalues; None if that would not be accurate."""
    factor, failed = torch.linalg.cholesky_ex(cov_a)
    if failed:
        return None
    # LAPACK's reduction of a generalized eigenproblem gives Lᵀ S_2 L in F³ operations; two products take 4 F³.
    product, failed = dsygst(cov_b.numpy().T, factor.numpy(), itype=2, lower=1)
    if failed:
        return None
    values = torch.linalg.eigvalsh(torch.from_numpy(product.T), UPLO="U")
    largest = float(values[-1])
    if values[0] <= 0:  # S_2 has as many negative eigenvalues (Sylvester's law): it is singular or not a covariance
        return None
    roots = values.sqrt()
    # The error of an eigenvalue is at most eps times the largest; a root near zero magnifies it by 1 / (2 root).
    error = torch.finfo(values.dtype).eps * largest * float((0.5 / roots).sum())
    return float(roots.sum()) if error <= _ACCURACY * traces else None


def _root(cov: Tensor, exact: float) -> Tensor:
    """R [F, F] with R Rᵀ = cov. `exact` is the relative precision in which `cov` was stored."""
    values, vectors = torch.linalg.eigh(cov)
    # An eigenvalue that is more negative than the stored precision explains means that this is not a covariance.
    floor = max(float(values.abs().max()) * len(values) * exact, 1e-12)
    if values.min() < -floor:
        raise DataError(
            f"not a covariance: its smallest eigenvalue is {values.min():.3g}, the largest {values.max():.3g}, "
            f"and rounding explains {-floor:.3g} at most"
        )
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps  # of the eigenvalues themselves
    return vectors * torch.where(values > noise, values, 0.0).sqrt()
