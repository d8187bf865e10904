"""Kronecker templates: `W(l) = sum_t kron(S(l, t), T(t))` (WAVE, arXiv 2406.17503).

Templates T are shared by all layers, scalers S are a layer's own. With `kron(S, T)` a matrix is a grid of tiles, each a
sum of whole templates that S scales; with `kron(T, S)` a template's entries lie apart, each a patch of S. Templates are
square and know nothing of a width: only the grid grows.

Shapes: m out features, n in features, w a template's side, K templates of a matrix, a = m/w and b = n/w the grid.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.dit import Condition, DiT
from fine_dist.model.factors import line_in_depth, spread_columns
from fine_dist.model.roles import Role

Order = Literal["scaler_template", "template_scaler"]


def kron_sum(scaler: Tensor, templates: Tensor, order: Order) -> Tensor:
    """`sum_t kron(S(t), T(t))` or `sum_t kron(T(t), S(t))`: S [K, a, b], T [K, w, w] -> [a w, b w]."""
    _, a, b = scaler.shape
    w = templates.shape[1]
    k = len(templates)
    # One product over templates, [a b, K] x [K, w w]; the order says how the four axes are laid out.
    # `torch.kron` for each template would make K matrices of full size and add them up.
    tiles = (scaler.reshape(k, a * b).T @ templates.reshape(k, w * w)).reshape(a, b, w, w)
    axes = (0, 2, 1, 3) if order == "scaler_template" else (2, 0, 3, 1)
    return tiles.permute(*axes).reshape(a * w, b * w)


class Templates(nn.Module):
    """The templates T [K, w, w] of one of the five matrices: `forward(x [..., n], S [K, a, b], bias) -> [..., m]`.

    They start orthonormal, as vectors of w^2 numbers.
    """

    roles: ClassVar[dict[str, Role]] = {"T": "gene"}

    def __init__(self, count: int, side: int, order: Order, generator: torch.Generator | None = None):
        super().__init__()
        self.order: Order = order
        # Orthonormal, so that the variance of W depends only on the number of templates and all templates differ.
        self.T = nn.Parameter(spread_columns(side * side, count, generator).T.reshape(count, side, side).contiguous())

    def forward(self, x: Tensor, scaler: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.compose(scaler), bias)

    def compose(self, scaler: Tensor) -> Tensor:
        """The weight [m, n] of these scalers."""
        return kron_sum(scaler, self.T, self.order)


class KronLinear(nn.Module):
    """One layer's matrix: its own scalers S [K, a, b] and bias [m]; the templates belong to the root."""

    roles: ClassVar[dict[str, Role]] = {"S": "scaler", "bias": "bias"}

    def __init__(self, templates: Templates, m: int, n: int, count: int, side: int):
        super().__init__()
        self._templates = (templates,)
        self.S = nn.Parameter(torch.zeros(count, m // side, n // side))
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        y: Tensor = self._templates[0](x, self.S, self.bias)
        return y

    def dense(self) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] that this layer multiplies by."""
        return self._templates[0].compose(self.S), self.bias

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of computing W and a product of `rows` rows; `backward` adds those of the backward pass."""
        [templates] = self._templates
        weight = self._numbers
        make, product = weight * len(templates.T), rows * weight
        trained = int(templates.T.requires_grad) + int(self.S.requires_grad)
        return make + product * (1 + backward) + (backward and bool(trained)) * (product + make * trained)

    def saved_for_backward(self, rows: int) -> int:
        """Numbers saved for the backward pass in addition to a dense product's: the computed weight."""
        return self._numbers

    @property
    def _numbers(self) -> int:
        side = self._templates[0].T.shape[1]
        return self.S[0].numel() * side * side


class KronDiT(DiT):
    """A DiT whose blocks are made of shared templates and each layer's own scalers.

    counts: templates K of each matrix. side: w, which divides the width. Scalers start on a line in depth, with the
    variance that makes Var(W) Xavier's, 2 / (m + n); adaLN's at zero.
    """

    def __init__(
        self, arch: Arch, side: int, counts: dict[str, int], order: Order, generator: torch.Generator | None = None
    ):
        templates = {matrix: Templates(counts[matrix], side, order, generator) for matrix in MATRICES}

        def matrix_of(matrix: str, layer: int) -> nn.Module:
            return KronLinear(templates[matrix], *arch.matrix(matrix), counts[matrix], side)

        super().__init__(arch, matrix_of, generator)
        self.templates = nn.ModuleDict(templates)
        self.side, self.counts, self.order = side, counts, order
        for matrix in MATRICES:
            if matrix != "adaln":  # adaLN-zero: a block starts as the identity
                m, n = arch.matrix(matrix)
                # orthonormal templates: a weight's variance is K E[S^2] / w^2
                std = side * math.sqrt(2 / ((m + n) * counts[matrix]))
                shape = self.scaler(matrix, 0).shape
                line = line_in_depth(arch.num_layers, shape.numel(), std, generator)
                for layer in range(arch.num_layers):
                    with torch.no_grad():
                        self.scaler(matrix, layer).copy_(line[layer].reshape(shape))

    def scaler(self, matrix: str, layer: int) -> nn.Parameter:
        return self.blocks[layer].get_submodule(matrix).S  # type: ignore[return-value]

    def layers_of(self, matrix: str) -> tuple[Tensor, Tensor]:
        """A matrix's scalers [L, K, a, b] and biases [L, m] over depth, detached, on the CPU."""
        modules: list[Any] = [block.get_submodule(matrix) for block in self.blocks]
        scalers = torch.stack([module.S.detach().float().cpu() for module in modules])
        return scalers, torch.stack([module.bias.detach().float().cpu() for module in modules])


def tiles_of(arch: Arch, side: int) -> dict[str, int]:
    """Tiles a b of each of a block's matrices at this width: as many templates can make any one layer's weights."""
    return {matrix: (m // side) * (n // side) for matrix in MATRICES for m, n in [arch.matrix(matrix)]}
