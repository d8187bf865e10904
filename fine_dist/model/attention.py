"""Multi-head self-attention without its projections.

Shapes: B batch, T tokens, A heads, d = D / A.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SAMPLE_FROM = 1 << 14
"""Scores of a sample from which `Attention` takes samples one by one; below, calls cost more than they save."""


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` of every head: `[B, T, 3 D] -> [B, T, D]`."""
    scores = num_heads * qkv.shape[1] ** 2
    cpu_bf16 = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16
    if cpu_bf16 and scores >= SAMPLE_FROM and not torch.compiler.is_compiling():
        return Attention.apply(qkv, num_heads)
    # Parted along a dimension of the middle, so that the gradients of q, k and v are stacked where they belong.
    q, k, v = (x.transpose(1, 2) for x in qkv.unflatten(2, (3, num_heads, -1)).unbind(2))  #        3 x [B, A, T, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(torch.autograd.Function):
    """Attention as products of a sample's heads: on a CPU in bf16 twice as fast as torch's fused kernel.

    `S = q k^T / sqrt(d)`, `P = softmax(S)`, `o = P v`. Gradients: `P^T g` of v; with `dP = g v^T` and
    `dS = P (dP - sum(P dP))`: `dS k / sqrt(d)` of q, `dS^T q / sqrt(d)` of k. Only q, k and v are kept; P [A, T, T] is
    made again, a sample at a time.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.num_heads = num_heads
        batch, tokens, width = qkv.shape
        out = qkv.new_empty(batch, tokens, width // 3)
        for i in range(batch):
            q, k, v = _heads(qkv[i], 3, num_heads)
            _heads(out[i], 1, num_heads)[0].copy_(_probabilities(q, k) @ v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        [qkv] = ctx.saved_tensors
        g, g_qkv = g.contiguous(), torch.empty_like(qkv)
        for i in range(len(qkv)):
            q, k, v = _heads(qkv[i], 3, ctx.num_heads)
            g_q, g_k, g_v = _heads(g_qkv[i], 3, ctx.num_heads)
            [g_out] = _heads(g[i], 1, ctx.num_heads)
            p = _probabilities(q, k)
            g_v.copy_(p.transpose(1, 2) @ g_out)
            g_p = g_out @ v.transpose(1, 2)  #                                                             [A, T, T]
            g_s = torch.ops.aten._softmax_backward_data(g_p, p, -1, p.dtype)
            torch.mul(g_s @ k, _scale(q), out=g_q)
            torch.mul(g_s.transpose(1, 2) @ q, _scale(q), out=g_k)
        return g_qkv, None


def _heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """`[T, parts A d] -> parts x [A, T, d]`, views."""
    return x.view(len(x), parts, num_heads, -1).permute(1, 2, 0, 3).unbind(0)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d))` [A, T, T] in the dtype of q; torch's kernel sums in fp32."""
    return torch.softmax((q * _scale(q)) @ k.transpose(1, 2), -1)


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])
