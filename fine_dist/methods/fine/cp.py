"""FINE's form as a tensor decomposition: one matrix's weights, stacked over layers, in CP (PARAFAC) form.

`W[l, i, j] = sum_k sigma[l, k] U[i, k] V[j, k]`: L layers, m x n a matrix, R components. It is computed by alternating
least squares: U, then V, then sigma is the least-squares solution given the other two. Khatri-Rao products are never
formed: for a DiT-XL's adaLN and R = D they would take 37 GB; these steps need about the memory of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fine_dist.core.errors import ArtifactError


@dataclass(frozen=True)
class Fit:
    """A decomposition: U [m, R] and V [n, R] with columns of unit norm, sigma [L, R], and its error.

    error:   ||W(l) - U diag(sigma(l)) V^T|| / ||W(l)|| for each layer, [L].
    history: the relative error of the whole stack after each sweep.
    """

    U: Tensor
    V: Tensor
    sigma: Tensor
    error: Tensor
    history: tuple[float, ...]


def sweep_flops(layers: int, m: int, n: int, rank: int) -> float:
    """FLOPs of the two products with the weights in one sweep over a stack [L, m, n], which dominate its cost."""
    return 4.0 * layers * m * n * rank


def decompose(
    weights: Tensor, rank: int, *, sweeps: int = 50, tolerance: float = 1e-5, generator: torch.Generator | None = None
) -> Fit:
    """CP decomposition of `weights` [L, m, n], on their device: the best of several starts, refined by ALS.

    The starts are the leading singular vectors of the stack along each side (random directions beyond them); for R up
    to min(m, n) Jennrich's closed form, which is exact for a stack that is of CP form; and for larger R the layers'
    own singular triples, which are exact once R reaches the sum of the layers' ranks. Products are in float32, and
    R x R systems are solved in float64. Stops after `sweeps`, or once a sweep improves the relative error by less than
    `tolerance`; a sweep that does not improve it is undone.

    Raises:
        ArtifactError: The weights hold NaN or Inf.
    """
    weights = weights.float()
    if not bool(torch.isfinite(weights).all()):
        raise ArtifactError("the weights to decompose contain NaN or Inf; use an earlier checkpoint of the ancestor")
    sides = directions(weights)
    starts = [
        tuple(leading(vectors, rank, generator) for _, vectors in sides),
        *jennrich(weights, rank, sides, generator),
        *layer_triples(weights, rank, generator),
    ]
    best = min((measured(weights, u, v, weights.mT @ u) for u, v in starts), key=lambda fit: fit[0])
    history = [best[0]]
    for _ in range(sweeps):
        _, u, v, sigma = best
        # `weights @ v` [L, m, R] and the sum over layers replace the Khatri-Rao product, which would have L n rows.
        u, _ = unit(solve_side(torch.einsum("lik,lk->ik", weights @ v, sigma), v, sigma))
        across = weights.mT @ u  #                                                                         [L, n, R]
        v, _ = unit(solve_side(torch.einsum("ljk,lk->jk", across, sigma), u, sigma))
        # `across` is reused: sigma's right-hand side needs the same product.
        candidate = measured(weights, u, v, across)
        gain = best[0] - candidate[0]
        # Near the optimum rounding can make a sweep worse, so the better of the two is kept.
        best = min(candidate, best, key=lambda fit: fit[0])
        history.append(best[0])
        if gain < tolerance:
            break
    _, u, v, sigma = best
    rest = (weights - compose(u, v, sigma)).flatten(1).norm(dim=1)
    return Fit(u, v, sigma, rest / weights.flatten(1).norm(dim=1).clamp_min(1e-30), tuple(history))


_EXACT_ABOVE = 0.02
"""Relative error above which the normal equations give the error accurately in float32."""


def measured(weights: Tensor, u: Tensor, v: Tensor, across: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """(relative error, U, V, the least-squares sigma of these factors). `across` is `W(l)^T U` [L, n, R].

    `||W - W'||^2 = ||W||^2 - 2 <W, W'> + ||W'||^2`, in which the last two terms follow from `across` and Gram matrices,
    so that W' need not be computed. For small errors this difference of large numbers is inaccurate, and W' is
    computed.
    """
    right = torch.einsum("jk,ljk->lk", v, across)  #                                                          [L, R]
    grams = gram(u) * gram(v)
    sigma = _solve(grams, right.T).T
    norm = weights.norm().double().clamp_min(1e-30)
    own = (gram(sigma) * grams).sum() - 2 * (sigma.double() * right.double()).sum()
    # Below zero only by rounding.
    error = float((1 + own / norm.square()).clamp_min(0).sqrt())
    if error < _EXACT_ABOVE:
        error = float((weights - compose(u, v, sigma)).norm() / norm)
    return error, u, v, sigma


def directions(weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For the m side and the n side of a stack: the squared singular values, descending, and the singular vectors as
    columns, float64."""
    stack = weights.double()
    sides = []
    for equation in ("lij,lkj->ik", "lij,lik->jk"):
        # Eigenvectors of the Gram matrix are the singular vectors of the unfolded stack, at m x m instead of m x L n.
        value, vector = torch.linalg.eigh(torch.einsum(equation, stack, stack))
        sides.append((value.flip(0), vector.flip(1)))
    return sides


def jennrich(
    weights: Tensor, rank: int, sides: list[tuple[Tensor, Tensor]], generator: torch.Generator | None
) -> list[tuple[Tensor, Tensor]]:
    """U [m, R] and V [n, R] in closed form (Leurgans, Ross and Abel 1993): exact for a stack of CP form with R at most
    min(m, n) and two layers or more; empty otherwise, and where the two sides do not span enough directions.

    The stack is compressed to what its K <= R leading directions on each side span, [L, K, K]. Two combinations of its
    layers are A = X diag(a) Y^T and B = X diag(b) Y^T with the same X and Y, so that the eigenvectors of A B^-1 are X;
    then a row k of X^-1 W(l) is sigma[l, k] y_k for every l, whose common direction is y_k.
    """
    layers, m, n = weights.shape
    if rank > min(m, n) or layers < 2:
        return []
    size = min(rank, *(int((value > _NOTHING * value[0]).sum()) for value, _ in sides))
    if size == 0:
        return []
    p, q = (vector[:, :size] for _, vector in sides)
    small = p.T @ weights.double() @ q  # [L, K, K]
    # the two combinations of layers that hold most of the stack, turned by 45 degrees so that neither is faint
    flat = small.flatten(1)
    first, second = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1).T[:2]
    a, b = (torch.einsum("l,lij->ij", c, small) for c in ((first + second), (first - second)))
    try:
        vectors = torch.linalg.eig(torch.linalg.solve(b.T, a.T).T).eigenvectors
        # Factors are real, and eigenvectors come in complex pairs where two components cannot be told apart. A pair
        # spans what its real and imaginary parts do.
        x, _ = unit(torch.where(_upper_of_pair(vectors), vectors.imag, vectors.real))
        rows = torch.linalg.solve(x, small).transpose(0, 1)  # [K, L, K]
    except torch.linalg.LinAlgError:  # singular: the stack is not of this form
        return []
    weight = torch.linalg.eigh(rows @ rows.transpose(1, 2)).eigenvectors[:, :, -1]  # [K, L]
    y, _ = unit(torch.einsum("kl,kli->ik", weight, rows))
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        return []
    u, v = p @ x, q @ y
    return [(leading(u, rank, generator), leading(v, rank, generator))]


def layer_triples(weights: Tensor, rank: int, generator: torch.Generator | None) -> list[tuple[Tensor, Tensor]]:
    """U [m, R] and V [n, R] as singular vectors of single layers, those of the R largest singular values of all layers;
    for R above min(m, n) alone, where no closed form of the shared factors is known."""
    if rank <= min(weights.shape[1:]):
        return []
    u, s, vt = torch.linalg.svd(
        weights, full_matrices=False
    )  #                             [L, m, k], [L, k], [L, k, n]
    order = s.flatten().argsort(descending=True)
    columns = u.transpose(1, 2).flatten(0, 1)[order].T, vt.flatten(0, 1)[order].T
    return [(leading(columns[0], rank, generator), leading(columns[1], rank, generator))]


_NOTHING = 1e-11
"""Share of the largest eigenvalue below which a direction holds float32's rounding (2^-23, squared, and some)."""


def _upper_of_pair(vectors: Tensor) -> Tensor:
    """[K]: which eigenvectors are the second of a complex pair (LAPACK puts them side by side)."""
    flags, second = [], False
    for is_complex in (vectors.imag.abs().amax(0) > 0).tolist():
        second = is_complex and not second
        flags.append(is_complex and not second)
    return torch.tensor(flags, device=vectors.device)


def compose(u: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """`U diag(sigma(l)) V^T` for every layer, [L, m, n]."""
    return (u * sigma[:, None, :]) @ v.T


def solve_side(product: Tensor, other: Tensor, sigma: Tensor) -> Tensor:
    """The least-squares factor of one side given the rest: `product (other^T other * sigma^T sigma)^-1`."""
    return _solve(gram(other) * gram(sigma), product.T).T


def gram(factor: Tensor) -> Tensor:
    """`factor^T factor` [R, R] in float64: rounded in float32 it need not be positive."""
    return factor.T.double() @ factor.double()


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` with a ridge of 1e-7 of the mean diagonal: overcomplete factors make it singular."""
    ridge = 1e-7 * matrix.diagonal().mean().clamp_min(1e-30)
    # Gram matrices are positive definite with the ridge, so Cholesky serves, at half of LU's cost.
    factor = torch.linalg.cholesky(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    return torch.cholesky_solve(right.double(), factor).float()


def leading(vectors: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """[size, rank]: the first columns, then random unit vectors where there are no more."""
    first = vectors.float()[:, :rank]
    extra = torch.randn(len(first), rank - first.shape[1], generator=generator).to(first)
    return torch.cat([first, unit(extra)[0]], dim=1)


def unit(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(columns scaled to norm one, their norms)."""
    norm = matrix.norm(dim=0).clamp_min(1e-30)
    return matrix / norm, norm
