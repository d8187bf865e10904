"""Operations inside a DiT's block, in plain torch, and the factored product with a custom backward pass.

Shapes: N or B samples, T tokens, D width, A heads of d = D / A features, J jobs (or samples) with a sigma of their own,
S rows of a job, R rank, m out features, n in features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6
"""Added to the variance in LayerNorm, as in DiT."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`LayerNorm(x) * (1 + scale) + shift`: x [N, T, D], shift and scale [N, 1, D] -> [N, T, D].

    LayerNorm has no affine parameters. Its kernel sums in fp32 for every dtype of x; autocast would copy a bf16 x to
    fp32 first.
    """
    with torch.autocast(x.device.type, enabled=False):
        normalized = F.layer_norm(x, x.shape[-1:], eps=EPS)
    # One fused operation: scale, product and sum in one pass over the activations, and one saved tensor fewer.
    return torch.addcmul(shift.to(x.dtype), normalized, 1 + scale.to(x.dtype))


def gated_add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """The residual branch `x + gate * y`: x and y [N, T, D], gate [N, 1, D] -> [N, T, D], in the dtype of x."""
    return torch.addcmul(x, gate.to(x.dtype), y.to(x.dtype))


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` for every head: `[B, T, 3 D] -> [B, T, D]`."""
    # Split along a middle dimension, so that the gradients of q, k and v go into one tensor without a copy.
    q, k, v = (x.transpose(1, 2) for x in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))  #        3 x [B, A, T, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FactoredProduct(torch.autograd.Function):
    """`((x V) * sigma) U^T + bias` with frozen U and V: only x and sigma get gradients.

    Autograd would do the same arithmetic but save `x V sigma` as well as `x V`. Here only `x V` is saved, no gradient
    of U, V or bias is formed, and the gradient of sigma is summed over rows in fp32:

        g_sigma = sum_s (x V) * (g U),    g_x = ((g U) * sigma) V^T

    Inputs: x [J, S, n], or x V itself [J, S, R] where v is None; sigma [J, R] fp32, one vector for each job or sample;
    bias [J, m]; u [m, R] and v [n, R] in `dtype`, the dtype of the products.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sigma: Tensor, bias: Tensor, u: Tensor, v: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        thin = x.to(dtype) if v is None else x.to(dtype) @ v  #                                            [J, S, R]
        # `thin` has R instead of n features a row; x itself is needed for gradients of U and V only, which are frozen.
        ctx.save_for_backward(thin, sigma, u, *([] if v is None else [v]))
        scaled = _times(thin, sigma[:, None], dtype)
        # The bias is added inside the product. `expand` repeats U for every job without copying it.
        return torch.baddbmm(bias[:, None].to(dtype), scaled, u.T.expand(len(sigma), *u.T.shape))  #       [J, S, m]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        thin, sigma, u, *v = ctx.saved_tensors
        back = g.to(thin.dtype) @ u  #                                                                     [J, S, R]
        # A sum over thousands of rows: in bf16, terms below 1/256 of the partial sum would be lost.
        g_sigma = (back * thin).sum(1, dtype=torch.float32)
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = _times(back, sigma[:, None], thin.dtype)
            g_x = g_x @ v[0].T if v else g_x
        return g_x, g_sigma, None, None, None, None


class ComposedWeight(torch.autograd.Function):
    """`U diag(sigma) V^T` [m, n] in `dtype`, the dtype of the products, with one kernel for each scaling.

    `U diag(sigma)` is computed again in the backward pass instead of saved, and the gradient of sigma is summed over
    rows in fp32:

        g_sigma = sum_m (g V) * U,    g_U = (g V) * sigma,    g_V = g^T U diag(sigma)

    Inputs: u [m, R], sigma [R] fp32, v [n, R].
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, sigma: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(u, sigma, v)
        return _times(u, sigma, dtype) @ v.to(dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, sigma, v = ctx.saved_tensors
        trains_u, trains_sigma, trains_v, _ = ctx.needs_input_grad
        back = g @ v.to(g.dtype) if trains_u or trains_sigma else g  #                                        [m, R]
        return (
            _times(back, sigma, u.dtype) if trains_u else None,
            (back * u).sum(0, dtype=torch.float32) if trains_sigma else None,
            (g.T @ _times(u, sigma, g.dtype)).to(v.dtype) if trains_v else None,
            None,
        )


def _times(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`(x * y).to(dtype)`, multiplied in the wider dtype of the two, as one kernel. For code without autograd."""
    if torch.promote_types(x.dtype, y.dtype) == dtype:
        return x * y
    return torch.mul(x, y, out=torch.empty(torch.broadcast_shapes(x.shape, y.shape), dtype=dtype, device=x.device))


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which products of this tensor are computed: autocast's where it is on, else the tensor's own."""
    kind = like.device.type
    # Autocast does not apply inside a custom autograd function, so it has to look up the dtype of an ordinary product.
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
