"""Shared factors: `W(l) = U diag(sigma(l)) V^T` with U, V owned once, at the model's root (FINE, arXiv 2409.19289).

Shapes: m out features, n in features, R rank, L layers, N rows that a matrix multiplies (tokens; samples for adaln).
Two compute paths give equal results up to rounding; the one with fewer multiply-adds is chosen (`multiply_adds`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.model.arch import MATRICES, Arch, check_size
from fine_dist.model.dit import Condition, DiT
from fine_dist.model.layers import ComposedWeight, FactoredProduct, compute_dtype
from fine_dist.model.roles import Role, of_role, roles

Path = Literal["auto", "composed", "factored"]


def multiply_adds(
    path: str, rows: int, m: int, n: int, r: int, *, train_factors: bool, train_scalers: bool, backward: bool = True
) -> int:
    """Multiply-adds of one factored matrix in a forward pass, plus those of the backward pass if `backward`.

    Composed: `m n r` to compute W, then a dense product; if any factor of W trains, W needs a gradient, which goes back
    through the computation of W. Factored: two thin products, and no weight gradient while U and V are frozen, because
    sigma's gradient is elementwise.
    """
    if path == "composed":
        # Backward pass: `dense` for the input's gradient. If anything in W trains, also
        # `dense` for W's gradient, then `make` for sigma's and once more for those of U and V.
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
    """The shared factors of one of the five matrices: U [m, R] and V [n, R].

    `forward(x [..., n], sigma, bias [m]) -> [..., m]`. sigma is [R], or has leading dimensions that broadcast against
    x's (`[B, 1, R]`: a vector a sample), which only the factored path can do.
    """

    roles: ClassVar[dict[str, Role]] = {"U": "gene", "V": "gene"}
    multiplied: ClassVar[tuple[str, ...]] = ("U", "V")

    def __init__(self, m: int, n: int, rank: int, generator: torch.Generator | None = None, path: Path = "auto"):
        super().__init__()
        self.path: Path = path
        self.U = nn.Parameter(spread_columns(m, rank, generator))
        self.V = nn.Parameter(spread_columns(n, rank, generator))

    def forward(self, x: Tensor, sigma: Tensor, bias: Tensor | None = None) -> Tensor:
        # A sigma for each sample has no common W to compose.
        if sigma.dim() > 1 or self.choose(x.numel() // x.shape[-1], sigma) == "factored":
            return factored_product(x, self.U, self.V, sigma, bias)
        dtype = compute_dtype(x)
        if dtype == torch.float32 or torch.compiler.is_compiling():
            return F.linear(x, self.compose(sigma), bias)
        weight: Tensor = ComposedWeight.apply(self.U, sigma, self.V, dtype)  # type: ignore[no-untyped-call]
        return F.linear(x, weight, bias)

    def compose(self, sigma: Tensor) -> Tensor:
        """`U diag(sigma) V^T` [m, n]."""
        # sigma scales U's columns first, [m, R]: cheaper than a
        # diagonal matrix, and the gradient of sigma is a sum over them.
        return (self.U * sigma) @ self.V.T

    def choose(self, rows: int, sigma: Tensor, backward: bool | None = None) -> str:
        """The cheaper path for a number of rows, given what trains now. `backward` None: as autograd is set."""
        if self.path != "auto":
            return self.path
        # Under ZeRO-3 a gathered parameter has its full shape only inside forward, so this may only be called there.
        return cheaper_path(
            rows,
            *self.shape,
            **self.training_of(sigma),
            backward=torch.is_grad_enabled() if backward is None else backward,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, R)."""
        return self.U.shape[0], self.V.shape[0], self.U.shape[1]

    def training_of(self, sigma: Tensor) -> dict[str, bool]:
        """What trains, as arguments of `multiply_adds`."""
        return {"train_factors": self.U.requires_grad, "train_scalers": sigma.requires_grad}


def factored_product(x: Tensor, u: Tensor, v: Tensor, sigma: Tensor, bias: Tensor | None) -> Tensor:
    """`((x V) * sigma) U^T + bias` [..., m], computed in autocast's dtype where it is on.

    With frozen factors and bias the product uses `model.layers.FactoredProduct`, whose backward pass never forms their
    gradients and sums sigma's in fp32: in bf16 a sum over thousands of tokens would lose the small updates of stage 2.
    When compiling, the plain form is used, from which the compiler derives the same backward pass.
    """
    # FactoredProduct returns no gradients for U, V and bias, so it may only be used if none of them trains.
    frozen = not (u.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad))
    dtype = compute_dtype(x)
    if frozen and sigma.requires_grad and sigma.dtype == torch.float32 and not torch.compiler.is_compiling():
        per_sample = sigma.dim() > 1
        # One layout for both cases: J jobs (or samples) of S rows each; a common sigma is a single job.
        rows = sigma.reshape(-1, sigma.shape[-1]) if per_sample else sigma[None]  #                          [J, R]
        stacked = x.reshape(len(rows), -1, x.shape[-1])  #                                                   [J, S, n]
        biases = torch.zeros_like(u[:, 0]) if bias is None else bias
        factors = u.to(dtype), v.to(dtype)
        y: Tensor = FactoredProduct.apply(  # type: ignore[no-untyped-call]
            stacked, rows, biases.expand(len(rows), -1), *factors, dtype
        )
        return y.reshape(*x.shape[:-1], -1)
    thin = x @ v  #                                                                                        [..., R]
    return F.linear(thin * sigma.to(thin.dtype), u, bias)  #                                               [..., m]


class FactoredLinear(nn.Module):
    """The matrix of one layer, with its own sigma [R] and bias [m]; U and V belong to the model's root.

    The genes are held in a tuple, which registers nothing: they appear once in `state_dict` and are partitioned once
    under ZeRO-3, whose hooks gather them because they are *called*.
    """

    roles: ClassVar[dict[str, Role]] = {"sigma": "scaler", "bias": "bias"}
    multiplied: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(self, genes: Genes, m: int, rank: int):
        super().__init__()
        # A module that is assigned as an attribute would be registered once more for every layer and matrix.
        self._genes = (genes,)
        self.sigma = nn.Parameter(torch.zeros(rank))
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        y: Tensor = self._genes[0](x, self.sigma, self.bias)
        return y

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of a product of `rows` rows on the cheaper path; `backward` adds those of the backward pass."""
        [genes] = self._genes
        path = genes.choose(rows, self.sigma, backward)
        return multiply_adds(path, rows, *genes.shape, **genes.training_of(self.sigma), backward=backward)

    def saved_for_backward(self, rows: int) -> int:
        """Numbers saved for the backward pass in addition to those of a dense product."""
        [genes] = self._genes
        if genes.choose(rows, self.sigma, True) == "composed":
            m, n, _ = genes.shape
            return m * n
        return (1 + genes.U.requires_grad) * rows * genes.shape[2]

    def saves_input(self, rows: int) -> bool:
        """Whether the backward pass needs the input."""
        [genes] = self._genes
        return genes.U.requires_grad or genes.choose(rows, self.sigma, True) == "composed"


@dataclass(frozen=True)
class SharedForm:
    """A model as `W(l) = U diag(sigma(l)) V^T` with frozen U and V, the form in which packs train (K = 5 matrices).

    factors: (U [m, R], V [n, R]) of each matrix.
    sigma:   [L, K, R], the trained scalers, in the order of `MATRICES`.
    biases:  {matrix: [m]} of each layer, frozen.
    shell:   embedders and final layer, as state-dict entries; frozen except for the label embedder.
    labels:  the label embedder's name and values [C + 1, D] if it trains, else None.
    name_of: (layer, matrix) -> the name of that sigma in the model's own state dict.
    """

    arch: Arch
    factors: dict[str, tuple[Tensor, Tensor]]
    sigma: Tensor
    biases: list[dict[str, Tensor]]
    shell: dict[str, Tensor]
    labels: tuple[str, Tensor] | None
    name_of: Callable[[int, str], str]

    @property
    def rank(self) -> int:
        return self.sigma.shape[2]


class FactoredDiT(DiT):
    """A DiT whose blocks are composed from shared genes and each layer's own scalers.

    Args:
        arch: Shape of the model.
        rank: R, the same for all matrices.
        generator: Random numbers of the initialization. Default: torch's global generator.
        path: How products are computed; `auto` takes the path with fewer multiply-adds.
    """

    def __init__(self, arch: Arch, rank: int, generator: torch.Generator | None = None, path: Path = "auto"):
        # On the meta device nothing is allocated; estimates build models there that are too large for this machine.
        if torch.get_default_device().type == "cpu":
            check_size(arch.count(rank), f"{arch.name} of rank {rank:,}")
        # Made before the blocks, which hold references to them, and registered after `nn.Module.__init__` below.
        genes = nn.ModuleDict({matrix: Genes(*arch.matrix(matrix), rank, generator, path) for matrix in MATRICES})

        def factored(matrix: str, layer: int) -> nn.Module:
            return FactoredLinear(genes[matrix], arch.matrix(matrix)[0], rank)  # type: ignore[arg-type]

        super().__init__(arch, factored, generator)
        self.rank = rank
        self.genes = genes
        for matrix in MATRICES:
            if matrix != "adaln":  # adaLN-zero: a block starts as the identity
                std = sigma_std(*arch.matrix(matrix), rank)
                for layer, sigma in enumerate(line_in_depth(arch.num_layers, rank, std, generator)):
                    with torch.no_grad():
                        self.sigma(matrix, layer).copy_(sigma)

    def factor(self, matrix: str) -> Genes:
        return self.genes[matrix]  # type: ignore[return-value]

    def sigma(self, matrix: str, layer: int) -> nn.Parameter:
        return self.blocks[layer].get_submodule(matrix).sigma  # type: ignore[return-value]

    def bias(self, matrix: str, layer: int) -> nn.Parameter:
        return self.blocks[layer].get_submodule(matrix).bias  # type: ignore[return-value]

    def sigma_table(self, matrix: str) -> Tensor:
        """A matrix's sigma over depth, [L, R], detached, on the CPU."""
        return torch.stack([self.sigma(matrix, layer).detach().float().cpu() for layer in range(self.arch.num_layers)])

    def block_weights(self, layer: int) -> dict[str, Tensor]:
        """The weights of a block as dense matrices, `{matrix: [m, n]}`."""
        return {matrix: self.factor(matrix).compose(self.sigma(matrix, layer)) for matrix in MATRICES}

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """The state dict of the ordinary dense DiT that computes the same function."""
        state = {name: p.clone() for name, p in of_role(self, "shell", "bias").items()}
        for layer in range(self.arch.num_layers):
            for matrix, weight in self.block_weights(layer).items():
                state[f"blocks.{layer}.{matrix}.weight"] = weight.detach().clone()
        return state

    def shared_form(self) -> SharedForm | None:
        """The form that a pack needs. None when anything besides sigma and the label embedder trains."""
        known = roles(self)
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if any(known[name] != "scaler" and p is not self.label.weight for name, p in trained.items()):
            return None
        depth = range(self.arch.num_layers)
        rows = [torch.stack([self.sigma(matrix, layer).detach().float() for matrix in MATRICES]) for layer in depth]
        return SharedForm(
            arch=self.arch,
            factors={matrix: (self.factor(matrix).U.detach(), self.factor(matrix).V.detach()) for matrix in MATRICES},
            sigma=torch.stack(rows),
            biases=[{matrix: self.bias(matrix, layer).detach() for matrix in MATRICES} for layer in depth],
            shell=of_role(self, "shell"),
            labels=("label.weight", self.label.weight.detach()) if self.label.weight.requires_grad else None,
            name_of=lambda layer, matrix: f"blocks.{layer}.{matrix}.sigma",
        )

    def paths(self, batch: int) -> dict[str, str]:
        """The compute path of each matrix at this batch, given what trains now; for logs and `--dry-run`."""
        return {m: self.factor(m).choose(self.arch.rows(m, batch), self.sigma(m, 0)) for m in MATRICES}


def sigma_std(m: int, n: int, rank: int) -> float:
    """Standard deviation of sigma that gives W the variance of Xavier's, 2 / (m + n).

    With columns of unit norm, `Var(W_ij) = R E[sigma^2] / (m n)`.
    """
    return math.sqrt(2 * m * n / (rank * (m + n)))


def line_in_depth(num_layers: int, rank: int, std: float, generator: torch.Generator | None) -> Tensor:
    """Initial sigma of stage 1, [L, R]: a line in depth between two random vectors of variance std^2.

    *Choice*: the paper finds learned sigma close to linear in depth, and a target's sigma is interpolated over depth;
    layers drawn independently do not vary smoothly over depth, and training does not make them.
    """
    ends = torch.randn(2, rank, generator=generator) * std
    t = torch.linspace(0, 1, num_layers, device=ends.device)[:, None]
    # Divided by the norm of the weights: otherwise the variance in the middle would be half of that at the ends.
    return ((1 - t) * ends[0] + t * ends[1]) / ((1 - t) ** 2 + t**2).sqrt()


def spread_columns(rows: int, rank: int, generator: torch.Generator | None) -> Tensor:
    """A random matrix [rows, rank] with orthonormal columns.

    For rank > rows it is an overcomplete dictionary: its rows are orthogonal, and scaled so that the mean square norm
    of the columns is one.
    """
    matrix = torch.empty(rows, rank)
    nn.init.orthogonal_(matrix, generator=generator)
    return matrix * math.sqrt(max(rank / rows, 1.0))
