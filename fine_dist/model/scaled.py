"""A dense matrix with a trained scale a row: what DiffFit (arXiv 2304.06648) puts on the ends of residual branches.

Shapes: m out features, n in features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fine_dist.model.dit import Condition, Dense
from fine_dist.model.ops import linear
from fine_dist.model.roles import Role


class ScaledDense(Dense):
    """`gamma * (x W^T + b)`, gamma [m] beginning at one.

    While gradients are recorded gamma multiplies the product: no gradient of W is ever formed. Without them gamma is
    folded into W and b first, so what is evaluated is, bit for bit, what `folded` deploys.
    """

    roles: ClassVar[dict[str, Role]] = {**Dense.roles, "gamma": "scaler"}

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.gamma = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        if torch.is_grad_enabled():
            y = linear(x, self.weight, self.bias)
            return y * self.gamma.to(y.dtype)
        return linear(x, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] of the ordinary matrix of the same function."""
        return self.gamma[:, None] * self.weight, self.gamma * self.bias

    def kept_numbers(self, rows: int) -> int:
        """Numbers that its backward pass keeps beyond a dense product's: the unscaled result."""
        return rows * self.out_features
