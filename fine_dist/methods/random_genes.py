"""A control: FINE's stage 2 with frozen *random* factors; it shows what training sigma achieves without genes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.methods.base import Descent, MethodConfig, Parent, Traits, needed
from fine_dist.methods.fine.method import FactoredTargets, factored_module
from fine_dist.methods.settings import RandomGenesConfig
from fine_dist.model.arch import Arch
from fine_dist.model.factors import FactoredDiT
from fine_dist.model.roles import of_role, train_only


class RandomGenes(FactoredTargets[RandomGenesConfig]):
    """FINE's rank, trained parameters and copied shell; U and V have the random values of the start of stage 1."""

    Config: ClassVar[type[MethodConfig]] = RandomGenesConfig
    label: ClassVar[str] = "random genes"
    paper: ClassVar[str] = "control for FINE, arXiv 2409.19289"
    summary: ClassVar[str] = "control: frozen random factors, trained sigma"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("learngene",), varies=frozenset({"depth"}))

    @property
    def from_methods(self) -> tuple[str, ...]:
        return ("fine",)

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        model = FactoredDiT(target, source.rank, generator)
        model.load_state_dict({**model.state_dict(), **of_role(source, "shell")})
        train_only(model, "scaler")
        return Descent(model, "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        return factored_module(arch, tensors)
