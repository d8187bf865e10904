"""SVD of each layer by itself: the rival of factors that layers share, at the same number of stored numbers.

Every block matrix of an ordinary ancestor is cut to its top R singular components, R the same for all and fixed by a
budget: `R = budget / (L sum(m + n + 1))` over the ancestor's L layers. The default budget is what one pair of shared
factors of rank D takes with its layers' own sigma (FINE's default), so that the comparison of the ablation in arXiv
2409.19289 (scratch, per-layer SVD, FINE) is one of equals.

*Choices*: a target's layer is the ancestor's nearest in relative depth, biases included; it is an ordinary DiT at once.
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
    """Top components of an ancestor's layers."""

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
                f"method.budget {self.config.budget} leaves no component: one of every matrix of "
                f"{parent.arch.num_layers} layers takes {self.numbers(parent.arch, 1):,} numbers"
            )

    def rank(self, ancestor: Arch) -> int:
        """Components of each matrix of this ancestor, at most all of them; 0 where the budget has no room for one."""
        budget = self.config.budget or shared_numbers(ancestor)
        fitting = budget // self.numbers(ancestor, 1)
        return min(self.config.rank or (fitting if self.config.budget else max(1, fitting)), ancestor.hidden_size)

    def numbers(self, ancestor: Arch, rank: int) -> int:
        """Numbers in so many components of all its block matrices: U, V and the singular values."""
        return ancestor.num_layers * rank * sum(sum(ancestor.matrix(matrix)) + 1 for matrix in MATRICES)

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent)
        rank, taken = self.rank(source.arch), nearest_layers(source.arch.num_layers, target.num_layers)
        theirs = source.module.state_dict()

        def cut(matrix: str, layer: int) -> tuple[Tensor, Tensor]:
            name = f"blocks.{int(taken[layer])}.{matrix}"
            return top_components(theirs[f"{name}.weight"], rank), theirs[f"{name}.bias"]

        model = DiT(target, generator=generator)
        model.load_state_dict(expanded(source.module, target.num_layers, cut))
        return Descent(model)


def shared_numbers(arch: Arch) -> int:
    """Numbers of one pair of factors of rank D a matrix, shared by all layers, with every layer's own scalers."""
    d = arch.hidden_size
    return d * sum(sum(arch.matrix(matrix)) for matrix in MATRICES) + arch.num_layers * len(MATRICES) * d


def top_components(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank [m, n] (Eckart and Young), in the weight's dtype."""
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    cut: Tensor = u[:, :rank] * s[:rank] @ vt[:rank]
    return cut.to(weight.dtype)
