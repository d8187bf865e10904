"""SVD of each layer separately: the baseline of factors shared by layers, at the same number of stored numbers.

Every block matrix of an ordinary ancestor is reduced to its top R singular components. R is the same for all matrices
and follows from a budget: `R = budget / (L sum(m + n + 1))` over the ancestor's L layers. The default budget is the
size of one pair of shared factors of rank D with the sigma of all layers (FINE's default), so that the ablation in
arXiv 2409.19289 (scratch, per-layer SVD, FINE) compares equal storage.

*Choices*: a target's layer is the ancestor's nearest in relative depth, biases included; a target is an ordinary DiT at
once.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import SvdConfig
from fine_dist.methods.shared import expanded
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.depth import nearest_layers
from fine_dist.model.dit import DiT


class Svd(Method[SvdConfig]):
    """Top singular components of an ancestor's layers."""

    Config: ClassVar[type[MethodConfig]] = SvdConfig
    label: ClassVar[str] = "per-layer SVD"
    paper: ClassVar[str] = "baseline of FINE, arXiv 2409.19289"
    summary: ClassVar[str] = "each layer's own top components, at the budget of shared factors"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset({"depth"}))

    def check_parent(self, parent: Artifact) -> None:
        super().check_parent(parent)
        if self.rank(parent.arch) < 1:
            raise ArtifactError(
                f"method.budget {self.config.budget} is too small: one component of every matrix of "
                f"{parent.arch.num_layers} layers takes {self.numbers(parent.arch, 1):,} numbers; give at least that"
            )

    def rank(self, ancestor: Arch) -> int:
        """Components of each matrix of this ancestor, at most D; 0 if the budget is too small for one."""
        budget = self.config.budget or shared_numbers(ancestor)
        fitting = budget // self.numbers(ancestor, 1)
        return min(self.config.rank or (fitting if self.config.budget else max(1, fitting)), ancestor.hidden_size)

    def numbers(self, ancestor: Arch, rank: int) -> int:
        """Numbers in the top `rank` components of all block matrices: U, V and the singular values."""
        return ancestor.num_layers * rank * sum(sum(ancestor.matrix(matrix)) + 1 for matrix in MATRICES)

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent)
        rank, layers = self.rank(source.arch), nearest_layers(source.arch.num_layers, target.num_layers)
        weights = source.module.state_dict()

        def reduced(matrix: str, layer: int) -> tuple[Tensor, Tensor]:
            name = f"blocks.{int(layers[layer])}.{matrix}"
            return top_components(weights[f"{name}.weight"], rank), weights[f"{name}.bias"]

        model = DiT(target, generator=generator)
        model.load_state_dict(expanded(source.module, target.num_layers, reduced))
        return Descent(model)


def shared_numbers(arch: Arch) -> int:
    """Numbers in one pair of factors of rank D for each matrix type, with the scalers of all layers."""
    d = arch.hidden_size
    return d * sum(sum(arch.matrix(matrix)) for matrix in MATRICES) + arch.num_layers * len(MATRICES) * d


def top_components(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank [m, n] (Eckart and Young), in the weight's dtype."""
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    nearest: Tensor = u[:, :rank] * s[:rank] @ vt[:rank]
    return nearest.to(weight.dtype)
