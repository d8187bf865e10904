"""A frozen matrix as its SVD, of which only the spectrum may shift (SVDiff, arXiv 2303.11305).

Shapes: m out features, n in features, r = min(m, n).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.model.dit import Condition
from fine_dist.model.factors import cheaper_path, factored_product, multiply_adds
from fine_dist.model.ops import linear
from fine_dist.model.roles import Role


class SpectralDense(nn.Module):
    """`x (U diag(relu(S + delta)) V^T)^T + b`: U [m, r], S [r], V [n, r], b [m] frozen, delta [r] from zero.

    The factors are stored as they were computed, so that another library's SVD never changes a saved model.
    """

    roles: ClassVar[dict[str, Role]] = {"U": "weight", "S": "weight", "V": "weight", "delta": "scaler", "bias": "bias"}

    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    delta: nn.Parameter
    bias: nn.Parameter

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        m, n, r = out_features, in_features, min(out_features, in_features)
        shapes = {"U": (m, r), "S": (r,), "V": (n, r), "bias": (m,), "delta": (r,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=name == "delta"))

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor) -> None:
        """Become this matrix [m, n]."""
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        for own, value in ((self.U, u), (self.S, s), (self.V, vt.T), (self.bias, bias)):
            own.copy_(value)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        if self.choose(x.numel() // x.shape[-1], torch.is_grad_enabled()) == "factored":
            return factored_product(x, self.U, self.V, self.spectrum, self.bias)
        return linear(x, self.compose(), self.bias)

    @property
    def spectrum(self) -> Tensor:
        """What the singular values have become, [r], none below zero."""
        return F.relu(self.S + self.delta)

    def compose(self) -> Tensor:
        """The matrix [m, n]."""
        return (self.U * self.spectrum) @ self.V.T

    def choose(self, rows: int, backward: bool) -> str:
        """Which path needs fewer multiply-adds."""
        return cheaper_path(rows, *self._sides, **self._training, backward=backward)

    @property
    def _sides(self) -> tuple[int, int, int]:
        return self.U.shape[0], self.V.shape[0], self.U.shape[1]

    @property
    def _training(self) -> dict[str, bool]:
        return {"train_factors": self.U.requires_grad, "train_scalers": self.delta.requires_grad}

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Of one product of `rows` rows, on the path it would take; with its backward pass if there is one."""
        path = self.choose(rows, backward)
        return multiply_adds(path, rows, *self._sides, **self._training, backward=backward)

    def kept_numbers(self, rows: int) -> int:
        """Numbers that its backward pass keeps beyond a dense product's."""
        return 2 * rows * self.U.shape[1] * (self.choose(rows, True) == "factored")
