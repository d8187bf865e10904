"""Mimetic initialisation of attention (Trockman and Kolter, arXiv 2305.09828): weights drawn as trained ones look.

In trained transformers the products of a head's weights are close to a multiple of the identity: queries with keys on
the positive side, values with the projection on the negative. Each head draws (eqs. 5 and 6)

    W_q^T W_k ~ alpha_qk Z + beta_qk I,    W_o W_v ~ alpha_vo Z - beta_vo I,    Z [D, D] with entries N(0, 1 / D),

takes the SVD `A = P S Q^T` of that whole [D, D] matrix, cuts it to the k components that a head has, and puts sqrt(S)
on both sides. Everything else is DiT's own initialisation; adaLN-zero still closes every branch at the first step, so
what the draw changes is the gradient that opens them.

Shapes: D width, A heads, k = D / A a head's size; weights are `out x in`, so q = x W_q^T.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent
from fine_dist.methods.settings import MimeticConfig
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT


class Mimetic(Method[MimeticConfig]):
    """From scratch, attention apart."""

    Config: ClassVar[type[MethodConfig]] = MimeticConfig
    label: ClassVar[str] = "mimetic"
    paper: ClassVar[str] = "Mimetic initialization, arXiv 2305.09828"
    summary: ClassVar[str] = "from scratch, attention drawn as trained attention looks"

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        model = DiT(target, generator=generator)
        size = target.hidden_size // target.num_heads
        with torch.no_grad():
            for block in model.blocks:
                qkv, o = block.get_submodule("qkv").weight, block.get_submodule("o").weight
                for head in range(target.num_heads):
                    q, k, v, out = self.head(target.hidden_size, size, generator)
                    own = slice(head * size, (head + 1) * size)
                    for third, rows in zip(qkv.chunk(3), (q, k, v)):  # type: ignore[operator]
                        third[own] = rows
                    o[:, own] = out  # type: ignore[operator]
        return Descent(model)

    def head(self, width: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A head's W_q, W_k, W_v [k, D] and its columns of W_o [D, k]."""
        config = self.config
        noise = torch.randn(2, width, width, generator=generator, dtype=torch.float64) / width**0.5
        eye = torch.eye(width, dtype=torch.float64)
        left, right = halves(config.alpha_qk * noise[0] + config.beta_qk * eye, size)
        out, value = halves(config.alpha_vo * noise[1] - config.beta_vo * eye, size)
        return left.T.float(), right.T.float(), value.T.float(), out.float()


def halves(product: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Two [D, size] factors, `left @ right.T` the best approximation of a [D, D] matrix of that rank."""
    u, s, vt = torch.linalg.svd(product)
    root = s[:size].sqrt()
    return u[:, :size] * root, vt[:size].T * root
