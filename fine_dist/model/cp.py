"""FINE's form as a tensor decomposition: a kind's weights, stacked over layers, in CP (PARAFAC) form.

`W[l, i, j] = sum_k sigma[l, k] U[i, k] V[j, k]`, L layers, m x n a matrix, R components. Alternating least squares:
each step is a product with the weights and a solve with an R x R Gram matrix. Khatri-Rao products are never formed: for
a DiT-XL's adaLN and R = D they alone would take 37 GB, while these steps need what the weights need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fit:
    """A decomposition: U [m, R] and V [n, R] with columns of unit norm, sigma [L, R], and what it leaves out.

    error:   ||W(l) - U diag(sigma(l)) V^T|| / ||W(l)|| for each layer, [L].
    history: the relative error of the whole stack after each sweep.
    """

    U: Tensor
    V: Tensor
    sigma: Tensor
    error: Tensor
    history: tuple[float, ...]


def decompose(
    weights: Tensor, rank: int, *, sweeps: int = 50, tolerance: float = 1e-5, generator: torch.Generator | None = None
) -> Fit:
    """CP-ALS of `weights` [L, m, n] at `rank`, in float32 with Gram matrices solved in float64.

    Starts from the leading singular vectors of the stack along each side, and random directions beyond them. Stops
    after `sweeps`, or once a sweep improves the relative error by less than `tolerance`.
    """
    weights = weights.float()
    norm = weights.norm().clamp_min(1e-30)
    u = leading(torch.einsum("lij,lkj->ik", weights, weights), rank, generator)
    v = leading(torch.einsum("lij,lik->jk", weights, weights), rank, generator)
    sigma = solve_sigma(weights, u, v)
    history: list[float] = []
    for _ in range(sweeps):
        u, _ = unit(solve_side(torch.einsum("lij,jk,lk->ik", weights, v, sigma), v, sigma))
        v, _ = unit(solve_side(torch.einsum("lij,ik,lk->jk", weights, u, sigma), u, sigma))
        sigma = solve_sigma(weights, u, v)
        history.append(float((weights - compose(u, v, sigma)).norm() / norm))
        if len(history) > 1 and history[-2] - history[-1] < tolerance:
            break
    left = (weights - compose(u, v, sigma)).flatten(1).norm(dim=1)
    return Fit(u, v, sigma, left / weights.flatten(1).norm(dim=1).clamp_min(1e-30), tuple(history))


def compose(u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """`U diag(sigma(l)) V^T` for every layer, [L, m, n]."""
    return (u * sigma[:, None, :]) @ v.T


def solve_side(product: Tensor, other: Tensor, sigma: Tensor) -> Tensor:
    """The least-squares factor of one side given the rest: `product (other^T other * sigma^T sigma)^-1`."""
    return _solve(gram(other) * gram(sigma), product.T).T


def solve_sigma(weights: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The least-squares sigma [L, R] of given factors: each layer on its own, all with one Gram matrix."""
    right = torch.einsum("ik,lik->lk", u, weights @ v)
    return _solve(gram(u) * gram(v), right.T).T


def gram(factor: Tensor) -> Tensor:
    """`factor^T factor` [R, R] in float64: rounded in float32 it need not be positive."""
    return factor.T.double() @ factor.double()


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` with a ridge of 1e-7 of the mean diagonal: overcomplete factors make it singular."""
    ridge = 1e-7 * matrix.diagonal().mean().clamp_min(1e-30)
    factor = torch.linalg.cholesky(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    return torch.cholesky_solve(right.double(), factor).float()


def leading(matrix: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """[size, rank]: eigenvectors of a Gram matrix by falling eigenvalue, then random unit vectors."""
    vectors = torch.linalg.eigh(matrix.double()).eigenvectors.flip(1).float()[:, :rank]
    extra = torch.randn(len(matrix), rank - vectors.shape[1], generator=generator).to(vectors)
    return torch.cat([vectors, unit(extra)[0]], dim=1)


def unit(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Columns scaled to norm one, and their norms."""
    norm = matrix.norm(dim=0).clamp_min(1e-30)
    return matrix / norm, norm
