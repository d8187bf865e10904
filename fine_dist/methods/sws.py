"""SWS (arXiv 2404.16897, IJCAI 2024): stages of layers that share one block each. With one stage it is Share Init.

Stage 1 trains the stages' blocks and the shell of an auxiliary model of 16 layers in stages of [3, 3, 4, 3, 3], by soft
distillation of the ancestor's output alone. The layers of a target are divided over the stages in order, as equally as
possible with the remainder in the first stages (12 layers: 3, 3, 2, 2, 2); the target is an ordinary DiT at once.

The auxiliary model's depth is the sum of `stages` and independent of the ancestor's: it is the depth of the learngene
as an artifact. *Choice*: a target with fewer layers than stages takes the stages that are nearest in relative depth.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.methods.base import Descent, MethodConfig, Parent, needed
from fine_dist.methods.settings import SwsConfig
from fine_dist.methods.shared import GeneLinear, SharedBlocks, SharedDiT, expanded
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.depth import nearest_layers
from fine_dist.model.dit import Dense, DiT
from fine_dist.model.roles import Role


class Sws(SharedBlocks[SwsConfig]):
    """Stage-wise sharing."""

    Config: ClassVar[type[MethodConfig]] = SwsConfig
    label: ClassVar[str] = "SWS"
    paper: ClassVar[str] = "SWS, arXiv 2404.16897"
    summary: ClassVar[str] = "one shared block a stage of layers"

    def auxiliary(self, arch: Arch) -> Arch:
        return arch.with_depth(sum(self.config.stages))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> SharedDiT:
        return staged(self.auxiliary(arch), layers_of(self.config.stages), generator)

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent).module
        genes: Any = source.genes
        stages = stages_of(target.num_layers, len(genes["qkv"]))
        model = DiT(target, generator=generator)
        model.load_state_dict(
            expanded(source, target.num_layers, lambda matrix, layer: genes[matrix][stages[layer]].dense())
        )
        return Descent(model)

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        return staged(arch, layers_of(self.config.stages)) if "genes.qkv.0.weight" in tensors else DiT(arch)


def layers_of(stages: tuple[int, ...]) -> list[int]:
    """The stage of each layer, from the number of layers of each stage: (2, 1) -> [0, 0, 1]."""
    return [stage for stage, count in enumerate(stages) for _ in range(count)]


def stages_of(num_layers: int, stages: int) -> list[int]:
    """The stage of each of a target's layers, ascending: near-equal counts, the remainder in the first stages."""
    if num_layers < stages:
        return list(map(int, nearest_layers(stages, num_layers)))
    each, more = divmod(num_layers, stages)
    return layers_of(tuple(each + (stage < more) for stage in range(stages)))


class SharedMatrix(Dense):
    """A weight [m, n] and a bias [m] that several layers share, initialized like those of one layer."""

    roles: ClassVar[dict[str, Role]] = {"weight": "gene", "bias": "gene"}

    def __init__(self, m: int, n: int, *, zero: bool = False, generator: torch.Generator | None = None):
        super().__init__(n, m)
        nn.init.zeros_(self.bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_uniform_(self.weight, generator=generator)


def staged(arch: Arch, stages: list[int], generator: torch.Generator | None = None) -> SharedDiT:
    """A DiT in which the layers of a stage share one block (SWS, arXiv 2404.16897). stages: each layer's stage, [L]."""
    genes = {
        matrix: nn.ModuleList(
            SharedMatrix(*arch.matrix(matrix), zero=matrix == "adaln", generator=generator)
            for _ in range(max(stages) + 1)
        )
        for matrix in MATRICES
    }
    return SharedDiT(arch, dict(genes), lambda matrix, layer: GeneLinear(genes[matrix][stages[layer]]), generator)
