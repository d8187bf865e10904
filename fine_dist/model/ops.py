"""Operations with backward passes written by hand: the product through frozen factors, and GELU.

Both are exact; what they save is passes over memory and kept activations. The factored product keeps `x V` alone (not
`x V sigma` as well) and never forms a gradient for U or V.

Shapes: J jobs, S rows of a job (tokens, or samples for adaLN), R rank, m out and n in features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class FactoredProduct(torch.autograd.Function):
    """`((x V) * sigma) U^T + bias`: x [J, S, n], or x V itself [J, S, R] when V is none; sigma [J, R]; bias [J, m].

    Gradients: `sum_s (x V) * (g U)` of sigma, `((g U) * sigma) V^T` of x. Products are in `dtype`; sigma and its
    gradient are in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, bias: Tensor, u: Tensor, v: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        thin = x.to(dtype)
        thin = thin if v is None else thin @ v  #                                                          [J, S, R]
        ctx.save_for_backward(thin, sigma, u, *([] if v is None else [v]))
        scaled = (thin * sigma[:, None]).to(dtype)
        return torch.baddbmm(bias[:, None].to(dtype), scaled, u.T.expand(len(sigma), *u.T.shape))  #       [J, S, m]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        thin, sigma, u, *v = ctx.saved_tensors
        back = g.to(thin.dtype) @ u  #                                                                     [J, S, R]
        g_sigma = (back * thin).sum(1, dtype=torch.float32)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (back * sigma[:, None]).to(thin.dtype)
            g_x = g_x if not v else g_x @ v[0].T
        return g_x, g_sigma, None, None, None, None


_CUBE = 0.044715
_SLOPE = 2 * math.sqrt(2 / math.pi)


class SigmoidGelu(torch.autograd.Function):
    """`gelu(x, approximate="tanh")`, in place of tanh the sigmoid it equals: `x s`, `s = sigmoid(k (x + c x^3))`.

    Keeping s makes the backward pass free of any exponential, and both passes are few sweeps over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.add(_slope_like(x), x * x, alpha=_SLOPE * _CUBE).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        # d(x s)/dx = s + x s (1 - s) k (1 + 3 c x^2)
        change = torch.add(_slope_like(x), x * x, alpha=3 * _SLOPE * _CUBE).mul_(x)
        change.addcmul_(change, s, value=-1)
        return torch.addcmul(s, change, s).mul_(g)


def _slope_like(x: Tensor) -> Tensor:
    return torch.full((), _SLOPE, dtype=x.dtype, device=x.device)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (DiT's)."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return SigmoidGelu.apply(x)
    return F.gelu(x, approximate="tanh")


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on, else the tensor's own."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
