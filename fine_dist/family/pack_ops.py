"""The block of a pack in few sweeps over memory: three operations with backward passes written by hand.

A block's two halves are the same: normalise, modulate, multiply (`ModulatedProduct`), something without parameters
(attention, GELU), multiply, gate and add (`GatedProduct`). Kept for the backward pass is what no sweep can make again:
the normalised tokens, and a product's own (`x V` where it goes through its factors, its input where W is composed).

Shapes: J jobs, B samples a job, N = J B samples, T tokens, S = B T rows of a job, D width, A heads, R rank, m out and
n in features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_dist.model.layers import EPS, FactoredProduct, attention

SWEEPS_UP_TO = 3 << 16
"""Numbers (768 KiB) up to which plain sweeps normalise in half of torch's time on a CPU: they stay in its cache."""
SHORT = 32
"""Tokens up to which attention is written out: the scores of a sequence are fewer than a fused kernel's overhead."""


@dataclass(frozen=True)
class Frozen:
    """One matrix of a layer for J jobs, without what trains: `W_j = U diag(sigma_j) V^T`.

    u [m, R] and v [n, R] in the products' dtype; bias [J, m]; composed: W is made, else x goes through V and U.
    """

    u: Tensor
    v: Tensor
    bias: Tensor
    composed: bool

    def times(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`x W_j^T + bias_j` [J, S, m] of x [J, S, n], and what its backward pass needs."""
        bias = self.bias[:, None].to(self.u.dtype)
        x = x.to(self.u.dtype)
        if self.composed:
            weight = (self.u * sigma[:, None]).to(self.u.dtype) @ self.v.T  #                                 [J, m, n]
            return torch.baddbmm(bias, x, weight.transpose(1, 2)), [x, weight]
        thin = x @ self.v  #                                                                                  [J, S, R]
        scaled = (thin * sigma[:, None]).to(thin.dtype)
        return torch.baddbmm(bias, scaled, self.u.T.expand(len(sigma), *self.u.T.shape)), [thin]

    def back(self, g: Tensor, sigma: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of x [J, S, n], in the products' dtype, and of sigma [J, R], summed in fp32 or sigma's own."""
        g = g.to(self.u.dtype)
        if self.composed:
            x, weight = kept
            g_weight = g.transpose(1, 2) @ x  #                                                               [J, m, n]
            return g @ weight, ((g_weight @ self.v) * self.u).sum(1, dtype=sigma.dtype)
        [thin] = kept
        back = g @ self.u  #                                                                                  [J, S, R]
        g_sigma = (back * thin).sum(1, dtype=sigma.dtype)
        scaled = back.mul_(sigma[:, None]) if back.dtype == sigma.dtype else (back * sigma[:, None]).to(back.dtype)
        return scaled @ self.v.T, g_sigma


def block(
    x: Tensor, gate: Tensor, sigma: Mapping[str, Tensor], matrices: Mapping[str, Frozen], num_heads: int
) -> Tensor:
    """`model.dit.block_forward` of J jobs: x [N, T, D] -> [N, T, D].

    gate: adaLN's input times V, [N, R].  sigma: [J, R] of each matrix.
    """
    adaln = matrices["adaln"]
    rows = gate.view(len(adaln.bias), -1, gate.shape[-1])  #                                                  [J, B, R]
    modulation = FactoredProduct.apply(rows, sigma["adaln"], adaln.bias, adaln.u, None, adaln.u.dtype)
    modulation = modulation.view(len(x), 1, 6, -1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(2)  #                         6 x [N, 1, D]
    qkv = ModulatedProduct.apply(x, shift_a, scale_a, sigma["qkv"], matrices["qkv"])
    x = GatedProduct.apply(x, _attention(qkv, num_heads), gate_a, sigma["o"], matrices["o"])
    h = F.gelu(ModulatedProduct.apply(x, shift_m, scale_m, sigma["in"], matrices["in"]), approximate="tanh")
    return GatedProduct.apply(x, h, gate_m, sigma["out"], matrices["out"])


def _attention(qkv: Tensor, num_heads: int) -> Tensor:
    if qkv.device.type == "cpu" and qkv.dtype != torch.bfloat16 and qkv.shape[1] <= SHORT:
        return ShortAttention.apply(qkv, num_heads)
    return attention(qkv, num_heads)


class ModulatedProduct(torch.autograd.Function):
    """`W_j (LN(x) * (1 + scale) + shift) + bias_j`: x [N, T, D], shift and scale [N, 1, D], sigma [J, R] -> [N, T, m].

    With n = LN(x) = (x - mean) / std and h the modulated tokens, a gradient g_h gives `sum_t g_h` to shift,
    `sum_t g_h n` to scale and, with e = g_h (1 + scale), `(e - mean(e) - n mean(e n)) / std` to x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, sigma: Tensor, matrix: Frozen) -> Tensor:
        jobs = len(sigma)
        normed, inverse = _normalised(x)  #                                                     [N, T, D], [N, T, 1]
        shift, factor = shift.to(x.dtype), scale.to(x.dtype) + 1
        h = torch.addcmul(shift, normed, factor)
        y, kept = matrix.times(h.view(jobs, -1, h.shape[-1]), sigma)
        # The tokens that a composed product keeps are made again from the normalised ones: one sweep less is kept.
        ctx.matrix, ctx.keeps_input = matrix, matrix.composed
        ctx.save_for_backward(normed, inverse, factor, shift, sigma, *kept[matrix.composed :])
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, factor, shift, sigma, *kept = ctx.saved_tensors
        jobs, d = len(sigma), normed.shape[-1]
        if ctx.keeps_input:
            kept = [torch.addcmul(shift, normed, factor).to(kept[0].dtype).view(jobs, -1, d), *kept]
        g_h, g_sigma = ctx.matrix.back(g.reshape(jobs, -1, g.shape[-1]), sigma, kept)
        g_h = g_h.to(normed.dtype).view(normed.shape)  #                                                     [N, T, D]
        product = g_h * normed
        g_scale, g_shift = product.sum(1, keepdim=True), g_h.sum(1, keepdim=True)
        e = torch.mul(g_h, factor, out=product)
        # torch's own backward pass, told that the tokens it sees are normalised already
        ones = torch.ones_like(inverse)
        g_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            e, normed, [d], torch.zeros_like(ones), ones, None, None, [True, False, False]
        )
        g_x = g_x.mul_(inverse)
        return g_x, g_shift, g_scale, g_sigma, None


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(x - mean) / std` over the width [..., D], and 1 / std [..., 1]."""
    if x.device.type != "cpu" or x.numel() > SWEEPS_UP_TO:
        normed, _, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        return normed, inverse
    centred = x - x.mean(-1, keepdim=True)
    inverse = centred.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
    return centred.mul_(inverse), inverse


class GatedProduct(torch.autograd.Function):
    """`x + gate * (W_j h + bias_j)`: x [N, T, D], h [N, T, n], gate [N, 1, D], sigma [J, R] -> [N, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, gate: Tensor, sigma: Tensor, matrix: Frozen) -> Tensor:
        y, kept = matrix.times(h.view(len(sigma), -1, h.shape[-1]), sigma)
        y = y.view(*x.shape[:-1], -1)
        ctx.matrix = matrix
        ctx.save_for_backward(y, gate, sigma, *kept)
        return torch.addcmul(x, gate, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, sigma, *kept = ctx.saved_tensors
        product = g * y
        g_gate = product.sum(1, keepdim=True)
        through = torch.mul(g, gate, out=product) if product.dtype == g.dtype else g * gate
        g_h, g_sigma = ctx.matrix.back(through.view(len(sigma), -1, g.shape[-1]), sigma, kept)
        return g, g_h.view(*g.shape[:-1], -1), g_gate, g_sigma, None


class ShortAttention(torch.autograd.Function):
    """Softmax attention over few tokens, written out: qkv [N, T, 3 D] -> [N, T, D], all heads in one batch.

    With P = softmax(s q k^T) and s = 1 / sqrt(D / A), a gradient g gives `P^T g` to v, and through
    `g_S = P * (g v^T - sum(P * g v^T))` it gives `s g_S k` to q and `s g_S^T q` to k.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> Tensor:
        n, t, d3 = qkv.shape
        size = d3 // 3 // num_heads
        heads = qkv.view(n, t, 3, num_heads, size).permute(2, 0, 3, 1, 4).reshape(3, n * num_heads, t, size)
        q, k, v = heads
        share = (q @ k.transpose(1, 2)).mul_(size**-0.5).softmax(-1)  #                                      [N A, T, T]
        ctx.save_for_backward(heads, share)
        return _joined(share @ v, n)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        heads, share = ctx.saved_tensors
        q, k, v = heads
        n, t, d = g.shape
        size = q.shape[-1]
        g = g.reshape(n, t, d // size, size).transpose(1, 2).reshape(-1, t, size)  #                      [N A, T, D/A]
        g_heads = torch.empty_like(heads)
        torch.bmm(share.transpose(1, 2), g, out=g_heads[2])
        g_share = (g @ v.transpose(1, 2)).mul_(share)
        g_scores = g_share.addcmul_(share, g_share.sum(-1, keepdim=True), value=-1).mul_(size**-0.5)
        torch.bmm(g_scores, k, out=g_heads[0])
        torch.bmm(g_scores.transpose(1, 2), q, out=g_heads[1])
        return g_heads.view(3, n, -1, t, size).permute(1, 3, 0, 2, 4).reshape(n, t, 3 * d), None


def _joined(heads: Tensor, samples: int) -> Tensor:
    """[N A, T, D/A] -> [N, T, D]."""
    return heads.view(samples, -1, *heads.shape[1:]).transpose(1, 2).reshape(samples, heads.shape[1], -1)
