"""Mimetic initialization of attention (Trockman and Kolter, arXiv 2305.09828): products like those of trained weights.

In trained transformers the products of attention's weights are close to multiples of the identity: positive for queries
with keys, negative for values with the projection. With a new Z [D, D] of entries N(0, 1 / D) for each product:

    W_q^T W_k = alpha_qk Z + beta_qk I    for every head (eq. 5),
    W_o W_v   = alpha_vo Z - beta_vo I    for all heads together (eq. 6).

Each product is factored by an SVD `P S Q^T` with sqrt(S) on both sides. Queries and keys of a head are the k leading
components of the head's own SVD. Values and projection come from *one* SVD of the complete [D, D] matrix, whose D
components are divided over the heads in order, so that the heads' products add up to the matrix exactly. (One SVD for
each head would add up to about twice the diagonal, because each head would take its leading components.)

Everything else is DiT's own initialization. adaLN-zero still multiplies every branch by zero at the first step; this
initialization changes the gradient of the gates.

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
    """Training from scratch, with attention's weights drawn to look like trained ones."""

    Config: ClassVar[type[MethodConfig]] = MimeticConfig
    label: ClassVar[str] = "mimetic"
    paper: ClassVar[str] = "Mimetic initialization, arXiv 2305.09828"
    summary: ClassVar[str] = "from scratch, attention drawn as trained attention looks"

    @torch.no_grad()
    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        model = DiT(target, generator=generator)
        for block in model.blocks:
            qkv, o = block.get_parameter("qkv.weight"), block.get_parameter("o.weight")
            q, k, v = qkv.chunk(3)
            # Rows of a head are consecutive in q and k.
            for rows in torch.arange(target.hidden_size).chunk(target.num_heads):
                product = noisy_identity(target.hidden_size, self.config.alpha_qk, self.config.beta_qk, generator)
                left, right = factor(product, len(rows))
                q[rows], k[rows] = left.T.float(), right.T.float()
            product = noisy_identity(target.hidden_size, self.config.alpha_vo, -self.config.beta_vo, generator)
            left, right = factor(product, target.hidden_size)
            o.copy_(left)
            v.copy_(right.T)
        return Descent(model)


def noisy_identity(width: int, noise: float, identity: float, generator: torch.Generator) -> Tensor:
    """`noise Z + identity I` [D, D] in float64."""
    z = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    product: Tensor = noise * z + identity * torch.eye(width, dtype=torch.float64)
    return product


def factor(product: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Two [D, size] factors whose product `left @ right.T` is the best approximation of this rank."""
    u, s, vt = torch.linalg.svd(product)
    root = s[:size].sqrt()
    return u[:, :size] * root, vt[:size].T * root
