"""Shared factors: `W(l) = U diag(sigma(l)) V^T` with U, V owned once, at the model's root (FINE, arXiv 2409.19289).

Shapes: m out features, n in features, R rank, L layers, N rows a matrix multiplies (tokens; samples for adaln).
Two compute paths give the same numbers; the cheaper is chosen by counting multiply-adds (`multiply_adds`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.model.dit import DiT
from fine_dist.model.zoo import KINDS, Arch

Path = Literal["auto", "composed", "factored"]


def multiply_adds(
    path: str, rows: int, m: int, n: int, r: int, *, train_factors: bool, train_scalers: bool, backward: bool = True
) -> int:
    """Multiply-adds of one factored matrix in a forward pass, and in its backward pass when there is one.

    Composed: `m n r` to make W, then a dense product; a weight gradient is needed as soon as anything in W trains, and
    goes back through the making of W. Factored: two thin products; no weight gradient at all while U and V are frozen,
    since sigma's gradient is elementwise.
    """
    if path == "composed":
        make, dense = m * n * r, rows * m * n
        if not backward:
            return make + dense
        trains = train_factors or train_scalers
        return make + dense + dense + (dense + make * (2 if train_factors else 1)) * trains
    thin = rows * r * (m + n)
    return thin * (1 + (backward and 1) + (backward and train_factors))


def cheaper_path(rows: int, m: int, n: int, r: int, **training: bool) -> str:
    """`composed` or `factored`, by `multiply_adds`; a tie goes to composed, whose products are fewer and larger."""
    cost = {path: multiply_adds(path, rows, m, n, r, **training) for path in ("composed", "factored")}
    return "factored" if cost["factored"] < cost["composed"] else "composed"


class Genes(nn.Module):
    """The shared factors of one kind of matrix: U [m, R] and V [n, R].

    `forward(x [..., n], sigma, bias [m]) -> [..., m]`. sigma is [R], or has leading dimensions that broadcast against
    x's (`[B, 1, R]`: a vector a sample), which only the factored path can do.
    """

    def __init__(self, m: int, n: int, rank: int, generator: torch.Generator | None = None, path: Path = "auto"):
        super().__init__()
        self.path: Path = path
        self.U = nn.Parameter(spread_columns(m, rank, generator))
        self.V = nn.Parameter(spread_columns(n, rank, generator))

    def forward(self, x: Tensor, sigma: Tensor, bias: Tensor | None = None) -> Tensor:
        if sigma.dim() > 1 or self.choose(x.numel() // x.shape[-1], sigma) == "factored":
            y = ((x @ self.V) * sigma) @ self.U.T
            return y if bias is None else y + bias
        return F.linear(x, self.compose(sigma), bias)

    def compose(self, sigma: Tensor) -> Tensor:
        """`U diag(sigma) V^T` [m, n]."""
        return (self.U * sigma) @ self.V.T

    def choose(self, rows: int, sigma: Tensor) -> str:
        """The path for so many rows, as things train now."""
        if self.path != "auto":
            return self.path
        # Under ZeRO-3 a gathered parameter has its full shape only inside forward, which is where this is asked.
        return cheaper_path(
            rows,
            self.U.shape[0],
            self.V.shape[0],
            self.U.shape[1],
            train_factors=self.U.requires_grad,
            train_scalers=sigma.requires_grad,
            backward=torch.is_grad_enabled(),
        )


class FactoredLinear(nn.Module):
    """One layer's matrix: its own sigma [R] and bias [m]; U and V stay with the root.

    The genes are held in a tuple, which registers nothing: they appear once in `state_dict` and are partitioned once
    under ZeRO-3, whose hooks gather them because they are *called*.
    """

    def __init__(self, genes: Genes, m: int, rank: int):
        super().__init__()
        self._genes = (genes,)
        self.sigma = nn.Parameter(torch.zeros(rank))
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor) -> Tensor:
        return self._genes[0](x, self.sigma, self.bias)


class FactoredDiT(DiT):
    """A DiT whose blocks are composed from shared genes and each layer's own scalers: FINE's learngene.

    rank: R, the same for all kinds. path: which compute path, `auto` by count.
    """

    def __init__(self, arch: Arch, rank: int, generator: torch.Generator | None = None, path: Path = "auto"):
        genes = nn.ModuleDict({kind: Genes(*arch.matrix(kind), rank, generator, path) for kind in KINDS})

        def factored(kind: str, layer: int) -> nn.Module:
            return FactoredLinear(genes[kind], arch.matrix(kind)[0], rank)  # type: ignore[arg-type]

        super().__init__(arch, factored, generator)
        self.rank = rank
        self.genes = genes
        for kind in KINDS:
            if kind != "adaln":  # adaLN-zero: a block starts as the identity
                std = sigma_std(*arch.matrix(kind), rank)
                for layer, sigma in enumerate(line_in_depth(arch.num_layers, rank, std, generator)):
                    with torch.no_grad():
                        self.sigma(kind, layer).copy_(sigma)

    def factor(self, kind: str) -> Genes:
        return self.genes[kind]  # type: ignore[return-value]

    def sigma(self, kind: str, layer: int) -> nn.Parameter:
        return self.blocks[layer].get_submodule(kind).sigma  # type: ignore[return-value]

    def sigma_table(self, kind: str) -> Tensor:
        """A kind's sigma over depth, [L, R], detached, on the CPU."""
        return torch.stack([self.sigma(kind, layer).detach().float().cpu() for layer in range(self.arch.num_layers)])

    def block_weights(self, layer: int) -> dict[str, Tensor]:
        """The weights of a block as dense matrices, `{kind: [m, n]}`."""
        return {kind: self.factor(kind).compose(self.sigma(kind, layer)) for kind in KINDS}

    def train_only(self, *roles: str) -> FactoredDiT:
        """Let parameters of these roles (`role`) train and freeze all others."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(role(name) in roles)
        return self

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """The state dict of the ordinary dense DiT that computes the same function."""
        state = {k: v.detach().clone() for k, v in self.state_dict().items() if role(k) in ("outside", "bias")}
        for layer in range(self.arch.num_layers):
            for kind, weight in self.block_weights(layer).items():
                state[f"blocks.{layer}.{kind}.weight"] = weight.detach().clone()
        return state

    def paths(self, batch: int) -> dict[str, str]:
        """The compute path each kind takes at this batch, as things train now (for logs and `--dry-run`)."""
        return {kind: self.factor(kind).choose(self.arch.rows(kind, batch), self.sigma(kind, 0)) for kind in KINDS}


def role(name: str) -> str:
    """What a parameter is, by its name: `gene` (U, V), `scaler` (sigma), block `bias` or `weight`, or `outside`."""
    if name.startswith("genes."):
        return "gene"
    if name.startswith("blocks."):
        return {"sigma": "scaler", "bias": "bias"}.get(name.rsplit(".", 1)[1], "weight")
    return "outside"


def sigma_std(m: int, n: int, rank: int) -> float:
    """Standard deviation of sigma that gives W the variance of Xavier's, 2 / (m + n).

    With columns of unit norm, `Var(W_ij) = R E[sigma^2] / (m n)`.
    """
    return math.sqrt(2 * m * n / (rank * (m + n)))


def line_in_depth(num_layers: int, rank: int, std: float, generator: torch.Generator | None) -> Tensor:
    """Where sigma starts in stage 1, [L, R]: on a line in depth between two random vectors of variance std^2.

    *Choice*: the paper finds learned sigma close to linear in depth, and a target's sigma is interpolated over depth;
    layers drawn independently have no depth to interpolate over, and training does not give them one.
    """
    ends = torch.randn(2, rank, generator=generator) * std
    t = torch.linspace(0, 1, num_layers)[:, None]
    return ((1 - t) * ends[0] + t * ends[1]) / ((1 - t) ** 2 + t**2).sqrt()


def spread_columns(rows: int, rank: int, generator: torch.Generator | None) -> Tensor:
    """[rows, rank] with orthonormal columns. Beyond `rank = rows` it is an overcomplete dictionary: orthogonal rows,
    scaled so that columns keep a mean square norm of one."""
    matrix = torch.empty(rows, rank)
    nn.init.orthogonal_(matrix, generator=generator)
    return matrix * math.sqrt(max(rank / rows, 1.0))
