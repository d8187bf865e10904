"""A block's elementwise parts, a sample at a time so that what a sample needs stays in a processor's cache.

`modulate` is LayerNorm with the conditioning's scale and shift as one kernel a sample; `gated_add` the residual branch.
Their backward passes are written by hand: no normalised copy is kept, and no product of full size is made for a sum.

Shapes: N samples, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fine_dist.model.ops import compute_dtype

EPS = 1e-6
"""Added to the variance."""
SAMPLE_FROM = 1 << 14
"""Numbers of a sample from which it pays to take samples one by one: below, calls cost more than memory."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`LayerNorm(x) * (1 + scale) + shift`: x [N, T, D], shift and scale [N, 1, D] -> [N, T, D].

    LayerNorm has no affine parameters of its own. It is computed in fp32; the result has the dtype of the product that
    reads it, autocast's where it is on.
    """
    if _sample_by_sample(x):
        return Modulate.apply(x, shift, scale, compute_dtype(x))
    return torch.addcmul(shift.to(x.dtype), F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale.to(x.dtype))


def gated_add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`x + gate * y`: x and y [N, T, D], gate [N, 1, D] -> [N, T, D], in x's dtype."""
    if _sample_by_sample(x):
        return GatedAdd.apply(x, gate, y)
    return torch.addcmul(x, gate.to(x.dtype), y.to(x.dtype))


def _sample_by_sample(x: Tensor) -> bool:
    large = x.dim() == 3 and x.shape[1] * x.shape[2] >= SAMPLE_FROM
    return large and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class Modulate(torch.autograd.Function):
    """`h = n (1 + scale) + shift`, `n = (x - mean) rstd`: x [N, T, D] -> h [N, T, D] of `dtype`.

    Kept are x, mean and rstd. With `d = g (1 + scale)`: `rstd (d - mean(d) - n mean(d n))` of x, `sum_t g n` of scale,
    `sum_t g` of shift, which is LayerNorm's backward pass with the sample's own weight and bias.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        count, tokens, width = x.shape
        weight, bias = (scale.to(x.dtype) + 1).view(count, width), shift.to(x.dtype).reshape(count, width)
        h = torch.empty(x.shape, dtype=dtype)
        mean, rstd = x.new_empty(count, tokens, 1), x.new_empty(count, tokens, 1)
        for i in range(count):
            for whole, part in zip((h, mean, rstd), torch.native_layer_norm(x[i], [width], weight[i], bias[i], EPS)):
                whole[i] = part
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.dtypes = shift.dtype, scale.dtype
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        g_x, g_weight, g_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        for i in range(len(x)):
            given = g[i].to(x.dtype), x[i], x.shape[-1:], mean[i], rstd[i], weight[i], bias[i], [True, True, True]
            for whole, part in zip((g_x, g_weight, g_bias), torch.ops.aten.native_layer_norm_backward(*given)):
                whole[i] = part
        of_shift, of_scale = ctx.dtypes
        return g_x, g_bias[:, None].to(of_shift), g_weight[:, None].to(of_scale), None


class GatedAdd(torch.autograd.Function):
    """`x + gate * y`. Gradients: `g` of x, `sum_t g * y` of the gate, `g * gate` of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        out, gates = torch.empty_like(x), gate.to(x.dtype)
        for i in range(len(x)):
            torch.addcmul(x[i], gates[i], y[i].to(x.dtype), out=out[i])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        gates = gate.to(g.dtype)
        g_gate, g_y = torch.empty_like(gates), torch.empty_like(y)
        for i in range(len(g)):
            torch.sum(g[i] * y[i], 0, keepdim=True, out=g_gate[i])
            g_y[i] = g[i] * gates[i]
        return g, g_gate.to(gate.dtype), g_y
