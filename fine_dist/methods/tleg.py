"""TLEG (arXiv 2312.05614, AAAI 2024): all layers on one line, `theta_l = theta_B + (l - 1) / L theta_A` (eq. 1).

Stage 1 trains theta_A, theta_B and the shell of an auxiliary model by soft distillation of the ancestor's output alone
(the paper's alpha is 1; `loss: {diffusion: 1 - alpha, output: alpha}` gives another). A target of L layers takes L
positions on the line, for weights and biases, and is an ordinary DiT at once, without a stage 2.

The auxiliary model's depth is a setting of this method and independent of the ancestor's: it is the depth of the
learngene as an artifact, and of the model that is evaluated for it. *Choice* for DiT: adaLN's weights are zero at both
ends of the line, so that a block starts as the identity.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.methods.base import Descent, MethodConfig, Parent, needed
from fine_dist.methods.settings import TlegConfig
from fine_dist.methods.shared import GeneLinear, SharedBlocks, SharedDiT, expanded
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.dit import DiT
from fine_dist.model.roles import Role


class Tleg(SharedBlocks[TlegConfig]):
    """Linear expansion."""

    Config: ClassVar[type[MethodConfig]] = TlegConfig
    label: ClassVar[str] = "TLEG"
    paper: ClassVar[str] = "TLEG, arXiv 2312.05614"
    summary: ClassVar[str] = "two shared blocks; a target's layers lie on the line through them"

    def auxiliary(self, arch: Arch) -> Arch:
        return arch.with_depth(self.config.auxiliary_layers or arch.num_layers)

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> SharedDiT:
        return on_a_line(self.auxiliary(arch), generator)

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source, positions = needed(parent).module, line_positions(target.num_layers)
        genes: Any = source.genes
        model = DiT(target, generator=generator)
        model.load_state_dict(
            expanded(source, target.num_layers, lambda matrix, layer: genes[matrix].dense(positions[layer]))
        )
        return Descent(model)

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        return on_a_line(arch) if "genes.qkv.base" in tensors else DiT(arch)


class LineMatrix(nn.Module):
    """`W = base + position * slope`, the same for the bias: `forward(x [..., n], position) -> [..., m]` (TLEG, eq. 1).

    The weights start at a truncated normal of std 0.02, or at zero if `zero`; the biases start at zero.
    """

    roles: ClassVar[dict[str, Role]] = dict.fromkeys(("base", "slope", "base_bias", "slope_bias"), "gene")

    def __init__(self, m: int, n: int, *, zero: bool = False, generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.slope = nn.Parameter(torch.zeros(m, n)), nn.Parameter(torch.zeros(m, n))
        self.base_bias, self.slope_bias = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(m))
        for weight in () if zero else (self.base, self.slope):
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)

    def forward(self, x: Tensor, position: Tensor | float) -> Tensor:
        return F.linear(x, *self.dense(position))

    def dense(self, position: Tensor | float) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] at a position on the line."""
        return self.base + position * self.slope, self.base_bias + position * self.slope_bias

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of computing W and a product of `rows` rows; `backward` adds those of the backward pass."""
        make, product = self.base.numel(), rows * self.base.numel()
        trains = self.base.requires_grad or self.slope.requires_grad
        return make + product * (1 + backward) + (backward and trains) * (make + product)

    def saved_for_backward(self, rows: int) -> int:
        """Numbers saved for the backward pass in addition to a dense product's: the computed weight."""
        return self.base.numel()


def on_a_line(arch: Arch, generator: torch.Generator | None = None) -> SharedDiT:
    """A DiT whose layers lie on one line: `theta_l = theta_B + (l - 1) / L theta_A` (TLEG, eq. 1), adaLN-zero."""
    genes = {
        matrix: LineMatrix(*arch.matrix(matrix), zero=matrix == "adaln", generator=generator) for matrix in MATRICES
    }
    positions = line_positions(arch.num_layers)
    return SharedDiT(arch, dict(genes), lambda matrix, layer: GeneLinear(genes[matrix], positions[layer]), generator)


def line_positions(num_layers: int) -> list[float]:
    """(l - 1) / L for l = 1 .. L."""
    return [layer / num_layers for layer in range(num_layers)]
