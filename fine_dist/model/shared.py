"""A DiT whose layers share whole matrices: one for several layers, or a line through two for all of them.

The genes lie at the root, once; a layer holds its genes in a tuple, which registers nothing, and *calls* them, which is
when ZeRO-3 gathers them. What every such matrix can also say is the dense one that it stands for (`dense`).

Shapes: m out features, n in features, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.dit import Condition, Dense, DiT, LinearFactory
from fine_dist.model.ops import linear
from fine_dist.model.roles import Role, of_role


class SharedMatrix(Dense):
    """A weight [m, n] and a bias [m] that several layers use as they are; they start as a layer's own would."""

    roles: ClassVar[dict[str, Role]] = {"weight": "gene", "bias": "gene"}

    def __init__(self, m: int, n: int, *, zero: bool = False, generator: torch.Generator | None = None):
        super().__init__(n, m)
        nn.init.zeros_(self.bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight, generator=generator)


class LineMatrix(nn.Module):
    """`W = base + place * slope`, the bias too: `forward(x [..., n], place) -> [..., m]` (TLEG, arXiv 2312.05614).

    Both weights start at a truncated normal of 0.02, both biases at zero; zero: the weights as well.
    """

    roles: ClassVar[dict[str, Role]] = dict.fromkeys(("base", "slope", "base_bias", "slope_bias"), "gene")

    def __init__(self, m: int, n: int, *, zero: bool = False, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.slope = nn.Parameter(torch.zeros(m, n)), nn.Parameter(torch.zeros(m, n))
        self.base_bias, self.slope_bias = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(m))
        for weight in () if zero else (self.base, self.slope):
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)

    def forward(self, x: Tensor, place: float) -> Tensor:
        return linear(x, *self.dense(place))

    def dense(self, place: float) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] at a place on the line."""
        return self.base + place * self.slope, self.base_bias + place * self.slope_bias

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Of one product of `rows` rows and the making of its weight; with its backward pass if there is one."""
        make, product = self.base.numel(), rows * self.base.numel()
        trains = self.base.requires_grad or self.slope.requires_grad
        return make + product * (1 + backward) + (backward and trains) * (make + product)

    def kept_numbers(self, rows: int) -> int:
        """Numbers that its backward pass keeps beyond a dense product's: the weight that was made."""
        return self.base.numel()


class OfGenes(nn.Module):
    """One layer's matrix, which has nothing of its own: it calls shared genes with what tells this layer apart."""

    def __init__(self, genes: nn.Module, *place: float):
        super().__init__()
        self._genes, self.place = (genes,), place

    @property
    def genes(self) -> Any:
        return self._genes[0]

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return self.genes(x, *self.place)

    def dense(self) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] that this layer multiplies by."""
        return self.genes.dense(*self.place)

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        return self.genes.multiply_adds(rows, backward=backward)

    def kept_numbers(self, rows: int) -> int:
        kept = getattr(self.genes, "kept_numbers", None)
        return kept(rows) if kept else 0


class SharedDiT(DiT):
    """A DiT whose root owns genes that the matrices of its blocks use.

    genes:  by matrix; appear in the state dict as `genes.MATRIX...`.
    linear: makes a layer's matrix of them.
    """

    def __init__(
        self, arch: Arch, genes: dict[str, nn.Module], linear: LinearFactory, generator: torch.Generator | None = None
    ):
        super().__init__(arch, linear, generator)
        self.genes = nn.ModuleDict(genes)


def staged(arch: Arch, stages: list[int], generator: torch.Generator | None = None) -> SharedDiT:
    """A DiT in which the layers of a stage share one block (SWS, arXiv 2404.16897). stages: each layer's stage, [L]."""
    genes = {
        matrix: nn.ModuleList(
            SharedMatrix(*arch.matrix(matrix), zero=matrix == "adaln", generator=generator)
            for _ in range(max(stages) + 1)
        )
        for matrix in MATRICES
    }
    return SharedDiT(arch, dict(genes), lambda matrix, layer: OfGenes(genes[matrix][stages[layer]]), generator)


def on_a_line(arch: Arch, generator: torch.Generator | None = None) -> SharedDiT:
    """A DiT whose layers lie on one line: `theta_l = theta_B + (l - 1) / L theta_A` (TLEG, eq. 1), adaLN-zero."""
    genes = {
        matrix: LineMatrix(*arch.matrix(matrix), zero=matrix == "adaln", generator=generator) for matrix in MATRICES
    }
    places = line_places(arch.num_layers)
    return SharedDiT(arch, dict(genes), lambda matrix, layer: OfGenes(genes[matrix], places[layer]), generator)


def line_places(num_layers: int) -> list[float]:
    """(l - 1) / L for l = 1 .. L."""
    return [layer / num_layers for layer in range(num_layers)]


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the ordinary dense DiT that computes the same function, from what its matrices say."""
    blocks: Any = model.blocks
    return expanded(model, len(blocks), lambda matrix, layer: blocks[layer].get_submodule(matrix).dense())


@torch.no_grad()
def expanded(
    model: nn.Module, num_layers: int, dense: Callable[[str, int], tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The state dict of a dense DiT of so many layers: what is outside the model's blocks, and block matrices as given.

    dense: (matrix, layer) -> its weight [m, n] and bias [m].
    """
    state = {name: p.clone() for name, p in of_role(model, "shell").items()}
    for layer in range(num_layers):
        for matrix in MATRICES:
            weight, bias = dense(matrix, layer)
            state[f"blocks.{layer}.{matrix}.weight"] = weight.detach().clone()
            state[f"blocks.{layer}.{matrix}.bias"] = bias.detach().clone()
    return state
