"""KIND (arXiv 2408.07337, ICML 2025): learngenes for all classes, tailors for groups of them, behind a class gate.

A token matrix of a layer is `U diag(sigma * g(y)) V^T`, without sharing over depth; g selects the learngenes and the
tailors of the group of the sample's class (`kind/gates.py`). Stage 1 trains everything on the plain diffusion loss. A
target is either *deployed* (`deploy` names groups; other tailors are dropped, nothing trains) or *transferred* to new
classes: learngenes, biases and the rest are frozen, tailors and the label embedder train.

Choices where the paper does not say: the null label uses learngenes alone; adaLN is an ordinary matrix (the FLOPs the
paper saves, 77.31G - 0.10066G r on DiT-L/2, are those of the other four); sizes as in the preset that the same group
published later: as many learngenes as tailors, D/2 of each, in two groups; classes that follow each other (ImageNet's
are sorted by meaning) form a group. A model with a gate is no ordinary DiT and saves and loads as itself;
`GatedDiT.merge` gives the ordinary one of a single group's classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.kind.config import KindConfig
from fine_dist.methods.kind.gates import GATED, GatedDiT, neighbours
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.dit import DiT, labels_from_null
from fine_dist.model.roles import Role, of_role, train_only


class Kind(Method[KindConfig]):
    """Learngenes and tailors."""

    Config: ClassVar[type[MethodConfig]] = KindConfig
    label: ClassVar[str] = "KIND"
    paper: ClassVar[str] = "KIND, arXiv 2408.07337"
    summary: ClassVar[str] = "learngenes for all classes, tailors behind a class gate; for new classes"
    tables_of: ClassVar[str] = "sigma"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("learngene",), varies=frozenset({"classes"}), condenses=True, dense=False)

    def check(self, parent: Artifact | None, target: Arch) -> None:
        super().check(parent, target)
        if parent is None or self.config.deploy is None:
            return
        groups = len(parent.tensors["gate.opens"]) - 1
        if beyond := [group for group in self.config.deploy if group >= groups]:
            raise ArtifactError(f"method.deploy: {parent.folder} has no group {beyond[0]}; legal: 0 to {groups - 1}")
        if target.num_classes != parent.arch.num_classes:
            raise ArtifactError(
                f"method.deploy: num_classes is {parent.arch.num_classes} in the parent, {target.num_classes} in the "
                "target; deployed tailors are for the parent's classes; leave deploy out to train for new classes"
            )

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"transfer": ("keep", "redraw")}

    # --- stage 1 ----------------------------------------------------------------------------------------------------

    def auxiliary(self, arch: Arch) -> Arch:
        self._sizes(arch)
        self._table(arch.num_classes, self.config.groups)
        return arch

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        return Condensation(self.blueprint(arch, generator))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> GatedDiT:
        learngenes, each = self._sizes(arch)
        table = self._table(arch.num_classes, self.config.groups)
        return GatedDiT(arch, learngenes, each, self.config.groups, table, generator)

    def _sizes(self, arch: Arch) -> tuple[int, int]:
        """(learngenes, tailors of each group). `ConfigError` when tailors cannot be divided into the groups."""
        half, groups = arch.hidden_size // 2, self.config.groups
        tailors = half // groups * groups if self.config.tailors is None else self.config.tailors
        if tailors % groups:
            near = max(1, round(tailors / groups)) * groups
            raise ConfigError(f"method.tailors: {tailors} cannot be divided into {groups} groups; try {near}")
        return self.config.learngenes or half, tailors // groups

    def _table(self, num_classes: int, groups: int) -> list[int]:
        """The group of each label, the null label's last."""
        table = self.config.table
        if table is None:
            return neighbours(num_classes, groups)
        if len(table) != num_classes or max(table) >= groups:
            raise ConfigError(
                f"method.table: {len(table)} classes in groups up to {max(table, default=0)}; a group from 0 to "
                f"{groups - 1} for each of {num_classes} classes is needed"
            )
        return [*table, -1]

    # --- targets ----------------------------------------------------------------------------------------------------

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        if self.config.deploy is not None:
            return Descent(source.keep(self.config.deploy))
        learngenes, each, groups = source.sizes
        same = target.num_classes == source.arch.num_classes
        keeps_table = same and self.config.table is None
        table = source.gate.table if keeps_table else self._table(target.num_classes, groups)
        # A separate seed: this generator may have the seed of stage 1, and would draw the same tailors again.
        fresh = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
        model = GatedDiT(target, learngenes, each, groups, table, fresh)
        inherited = of_role(source, *_ROLES, *(_TAILORS if self.config.transfer == "keep" else ()))
        if not same:
            null = inherited["label.weight"][-1]
            inherited["label.weight"] = labels_from_null(null, target.num_classes, generator).weight.detach()
        model.load_state_dict({**model.state_dict(), **inherited})
        trained: tuple[Role, ...] = ("tailor", "shell") if self.config.trains == "tailors_and_shell" else ("tailor",)
        train_only(model, *trained)
        model.label.requires_grad_(True)
        return Descent(model, "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        try:
            opens, learngenes = tensors["gate.opens"], len(tensors["blocks.0.qkv.sigma"])
        except KeyError as absent:
            raise ArtifactError(f"these tensors have no gate ({absent}): no model of this method") from None
        groups = len(opens) - 1
        return GatedDiT(arch, learngenes, opens.shape[1] // max(groups, 1), groups, [-1] * (arch.num_classes + 1))

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        return {matrix: model.sigma_table(matrix) for matrix in GATED}  # type: ignore[operator]


_ROLES: tuple[Role, ...] = ("gene", "weight", "bias", "shell")
"""Roles of the parameters that every target inherits."""
_TAILORS: tuple[Role, ...] = ("tailor",)
