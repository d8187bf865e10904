"""GELU in its tanh form (DiT's), with a backward pass by hand.

On a CPU torch's kernel spends its time in tanh; the sigmoid that equals it takes a third of that. What it takes more
are sweeps, which cost little when they are made a piece at a time, so that a piece stays in a processor's cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 1 << 17
"""Numbers a thread sweeps over at a time (512 KiB in fp32)."""
KEPT_UP_TO = 1 << 20
"""Numbers up to which the sigmoid is kept for the backward pass; of more it is made again, and memory stays torch's."""

_CUBE = 0.044715
_SLOPE = 2 * math.sqrt(2 / math.pi)


def gelu(x: Tensor) -> Tensor:
    """`gelu(x, approximate="tanh")` of any shape, in x's dtype."""
    by_hand = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if by_hand and not torch.compiler.is_compiling():
        return SigmoidGelu.apply(x)
    return F.gelu(x, approximate="tanh")


class SigmoidGelu(torch.autograd.Function):
    """`x s` with `s = sigmoid(p)`, `p = k (x + c x^3)`: sums in fp32, whatever x has.

    The derivative is `s + x s (1 - s) p'`, and `x p' = 3 p - 2 k x`, hence `s (1 + 3 (1 - s) (p - 2/3 k x))`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        keeps = x.dtype == torch.float32 and x.numel() <= KEPT_UP_TO and ctx.needs_input_grad[0]
        kept = torch.empty_like(x) if keeps else None
        for x_i, out_i, *s_i in _pieces(x, out, *([] if kept is None else [kept])):
            v = x_i.float()
            s = torch.sigmoid(_argument(v), out=s_i[0] if s_i else None)
            out_i.copy_(v * s) if out_i.dtype != v.dtype else torch.mul(v, s, out=out_i)
        ctx.save_for_backward(x, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, kept = ctx.saved_tensors
        out = torch.empty_like(x)
        for x_i, g_i, out_i, *s_i in _pieces(x, g.contiguous(), out, *([] if kept is None else [kept])):
            v = x_i.float()
            p = _argument(v)
            s = s_i[0] if s_i else p.sigmoid()
            p.sub_(v, alpha=2 / 3 * _SLOPE)
            p.addcmul_(p, s, value=-1)
            slope = torch.addcmul(s, s, p, value=3)
            out_i.copy_(slope.mul_(g_i)) if out_i.dtype != v.dtype else torch.mul(slope, g_i, out=out_i)
        return out


def _argument(v: Tensor) -> Tensor:
    """`k (v + c v^3)`."""
    return torch.addcmul(v.new_full((), _SLOPE), v, v, value=_SLOPE * _CUBE).mul_(v)


def _pieces(*tensors: Tensor) -> Any:
    """Of tensors that lie in one piece each: the same stretch of all, one after another."""
    size = PIECE * torch.get_num_threads()
    return zip(*(tensor.view(-1).split(size) for tensor in tensors))
