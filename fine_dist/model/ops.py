"""Products and GELU with backward passes written by hand.

All are exact; what they save is passes over memory, kept activations and gradients that nobody asked for. The factored
product keeps `x V` alone (not `x V sigma` as well) and never forms a gradient for U or V; the composed one makes the
gradients of U, V and sigma from that of W.

Shapes: J jobs, S rows of a job (tokens, or samples for adaLN), N rows, R rank, m out and n in features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ONEDNN_FROM = 1 << 22
"""Multiply-adds from which a product on a CPU is oneDNN's: below, setting one up costs more than it saves."""
_CPU_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ONEDNN: tuple[torch.dtype, ...] = ()
"""Dtypes of which oneDNN has a product here: bf16 needs AVX-512, and without it there is none to be had."""
if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _ONEDNN = (torch.float32, torch.bfloat16) if _CPU_BF16 else (torch.float32,)


def emulates_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are emulated there, many times slower than fp32: a CPU without AVX-512."""
    return device.type == "cpu" and not _CPU_BF16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x [..., n], W [m, n], b [m] -> [..., m], in autocast's dtype where it is on.

    On a CPU it is `Linear`, which adds the bias inside the product.
    """
    dtype = compute_dtype(x)
    if not _by_hand(x, dtype) or x.numel() * weight.shape[0] < ONEDNN_FROM:
        return F.linear(x, weight, bias)
    return Linear.apply(x, weight, bias, dtype)


class Linear(torch.autograd.Function):
    """`y = x W^T + b` on a CPU: x [..., n], W [m, n], b [m] or none, product in `dtype`.

    Gradients: `g W` of x, `g^T x` of W, `sum_rows g` of b.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows, cast = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, cast)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return product(rows, cast, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.dtypes
        g = g.reshape(-1, g.shape[-1]).to(weight.dtype)
        g_x = product(g, weight.T).view(ctx.shape).to(of_x) if ctx.needs_input_grad[0] else None
        g_weight = (g.T @ rows).to(of_weight) if ctx.needs_input_grad[1] else None
        g_bias = column_sums(g, of_bias) if ctx.needs_input_grad[2] else None
        return g_x, g_weight, g_bias, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` of tensors of one dtype, outside autograd: x [N, n], W [m, n] of any strides -> [N, m].

    oneDNN's where it is large: it adds the bias on the way, where MKL's begins with a copy of it to every row.
    """
    bias = None if bias is None else bias.to(x.dtype)
    large = len(x) * weight.numel() >= ONEDNN_FROM
    if large and x.device.type == "cpu" and x.dtype in _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def column_sums(g: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum_rows g` [m] of g [N, m], as a product with ones: on a CPU torch's sum over rows takes twice the time, and of
    bf16 it makes a copy in `dtype` first. Rounded to g's dtype, as the gradient of a weight is."""
    return (g.new_ones(1, len(g)) @ g)[0].to(dtype)


class ComposedProduct(torch.autograd.Function):
    """`x W^T + b` with `W = U diag(sigma) V^T`: x [..., n], U [m, R], sigma [R], V [n, R], b [m] or none.

    With `G = g^T x` [m, n], the gradient of W, and `H = G V` [m, R]: `H diag(sigma)` of U, `sum_rows U * H` of sigma,
    `G^T (U diag(sigma))` of V. W is kept, as a dense product keeps its own; `U diag(sigma)` is made again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, sigma: Tensor, v: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight = product((u * sigma).to(dtype), v.to(dtype))
        ctx.save_for_backward(rows if any(ctx.needs_input_grad[1:4]) else None, weight, u, sigma, v)
        ctx.shape, ctx.of_x, ctx.of_bias = x.shape, x.dtype, None if bias is None else bias.dtype
        return product(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, u, sigma, v = ctx.saved_tensors
        g = g.reshape(-1, g.shape[-1]).to(weight.dtype)
        g_x = product(g, weight.T).view(ctx.shape).to(ctx.of_x) if ctx.needs_input_grad[0] else None
        g_u = g_sigma = g_v = None
        if rows is not None:
            g_weight = g.T @ rows  #                                                                       [m, n]
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                h = product(g_weight, v.T.to(g.dtype)).to(u.dtype)  #                                      [m, R]
                g_u = h * sigma if ctx.needs_input_grad[1] else None
                g_sigma = (u * h).sum(0, dtype=sigma.dtype) if ctx.needs_input_grad[2] else None
            if ctx.needs_input_grad[3]:
                g_v = (g_weight.T @ (u * sigma).to(g.dtype)).to(v.dtype)  #                                [n, R]
        g_bias = column_sums(g, ctx.of_bias) if ctx.needs_input_grad[4] else None
        return g_x, g_u, g_sigma, g_v, g_bias, None


def composed_product(x: Tensor, u: Tensor, sigma: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`x (U diag(sigma) V^T)^T + b` by making W: x [..., n] -> [..., m], in autocast's dtype where it is on."""
    dtype = compute_dtype(x)
    if _by_hand(x, dtype):
        return ComposedProduct.apply(x, u, sigma, v, bias, dtype)
    return F.linear(x, (u * sigma) @ v.T, bias)


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
        thin = thin if v is None else _stacked(thin, v.T)  #                                               [J, S, R]
        ctx.save_for_backward(thin, sigma, u, *([] if v is None else [v]))
        scaled = (thin * sigma[:, None]).to(dtype)
        if len(sigma) == 1:
            return product(scaled[0], u, bias[0])[None]  #                                                 [1, S, m]
        return torch.baddbmm(bias[:, None].to(dtype), scaled, u.T.expand(len(sigma), *u.T.shape))  #       [J, S, m]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        thin, sigma, u, *v = ctx.saved_tensors
        back = _stacked(g.to(thin.dtype), u.T)  #                                                          [J, S, R]
        g_sigma = (back * thin).sum(1, dtype=torch.float32)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (back * sigma[:, None]).to(thin.dtype)
            g_x = g_x if not v else _stacked(g_x, v[0])
        return g_x, g_sigma, None, None, None, None


def _stacked(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` of one W for all jobs: [J, S, n] -> [J, S, m]."""
    return product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


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


SIGMOID_GELU_UP_TO = 1 << 20
"""Numbers up to which `SigmoidGelu`'s sweeps stay in a processor's cache, where they win over torch's one pass."""


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (DiT's)."""
    by_hand = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    if by_hand and x.numel() <= SIGMOID_GELU_UP_TO:
        return SigmoidGelu.apply(x)
    return F.gelu(x, approximate="tanh")


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on, else the tensor's own."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def _by_hand(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product goes a way of our own: on a CPU, and no compiler is reading it."""
    return x.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()
