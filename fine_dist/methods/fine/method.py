"""FINE (arXiv 2409.19289): `W(l) = U diag(sigma(l)) V^T` with U and V shared by all layers.

Stage 1 trains U, V, sigma and what is outside the blocks on the plain diffusion loss (eq. 5), from random factors
(`joint`) or from the CP decomposition of an ancestor's weights (`decompose`). Stage 2 trains a target's sigma alone.

Choices where the paper is silent: R = D; biases are a layer's own, carried over to a target like sigma and frozen in
stage 2; sigma of adaLN starts at zero (adaLN-zero), the others' on a line in depth (`line_in_depth`). The paper starts
a target's sigma at random; ours starts at `segment`, and the paper's is the value `random`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.fine.config import FineConfig
from fine_dist.methods.fine.cp import decompose
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.depth import INITIALS
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT, SharedForm
from fine_dist.model.roles import of_role, train_only


class Fine(Method[FineConfig]):
    """FINE's three stages."""

    Config: ClassVar[type[MethodConfig]] = FineConfig
    label: ClassVar[str] = "FINE"
    paper: ClassVar[str] = "FINE, arXiv 2409.19289"
    summary: ClassVar[str] = "shared factors U, V; a target trains sigma alone"
    tables_of: ClassVar[str] = "sigma"

    @property
    def traits(self) -> Traits:
        from_ancestor = self.config.initial == "decompose"
        return Traits(
            parents=("learngene",),
            varies=frozenset({"depth"}),
            condenses=True,
            ancestor="must" if from_ancestor else "may",
            same_shape=from_ancestor,
        )

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"sigma": tuple(INITIALS)}

    # --- stage 1 ----------------------------------------------------------------------------------------------------

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        module = self.blueprint(arch, generator)
        if self.config.initial == "joint":
            return Condensation(module)
        if ancestor is None:
            raise ArtifactError("method.initial decompose takes factors from an ancestor; give its folder as ancestor")
        errors = self.decompose(module, ancestor, generator)
        return Condensation(module, report={"decomposition_error": errors}, lines=_table(errors))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> FactoredDiT:
        return FactoredDiT(arch, self.config.rank or arch.hidden_size, generator, self.config.path)

    def decompose(self, module: FactoredDiT, ancestor: DiT, generator: torch.Generator) -> dict[str, list[float]]:
        """CP of each matrix's weights over layers, into `module`; biases and the shell are copied.

        The relative error that is left, by matrix and layer.
        """
        depth = ancestor.arch.num_layers
        state = ancestor.state_dict()
        errors: dict[str, list[float]] = {}
        with torch.no_grad():
            for name, own in of_role(module, "shell", "bias").items():
                own.copy_(state[name])
            for matrix in MATRICES:
                stack = torch.stack([state[f"blocks.{layer}.{matrix}.weight"] for layer in range(depth)])
                fit = decompose(
                    stack,
                    module.rank,
                    sweeps=self.config.sweeps,
                    tolerance=self.config.tolerance,
                    generator=generator,
                )
                genes = module.factor(matrix)
                genes.U.copy_(fit.U)
                genes.V.copy_(fit.V)
                for layer in range(depth):
                    module.sigma(matrix, layer).copy_(fit.sigma[layer])
                errors[matrix] = fit.error.tolist()
        return errors

    # --- stage 2 ----------------------------------------------------------------------------------------------------

    @property
    def sigma_initial(self) -> str:
        """Where sigma begins. Neighbouring layers of a decomposed ancestor have no common course over depth that a mean
        could keep, so a target's layer takes one of them whole."""
        return self.config.sigma or ("segment" if self.config.initial == "joint" else "aligned")

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        model = FactoredDiT(target, source.rank, generator, self.config.path)
        state = of_role(source, "gene", "shell")
        layers = range(source.arch.num_layers)
        for matrix in MATRICES:
            biases = torch.stack([source.bias(matrix, layer).detach() for layer in layers])
            begin = INITIALS[self.sigma_initial]
            table = source.sigma_table(matrix)
            for layer, (s, b) in enumerate(zip(*begin.layers(matrix, table, biases, target.num_layers, generator))):
                state[f"blocks.{layer}.{matrix}.sigma"] = s
                state[f"blocks.{layer}.{matrix}.bias"] = b
        model.load_state_dict(state)
        train_only(model, "scaler")
        return Descent(model, "some")

    # --- what becomes of it -----------------------------------------------------------------------------------------

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        return factored_module(arch, tensors, self.config.path)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        return model.merge()  # type: ignore[operator,no-any-return]

    def pack(self, model: nn.Module) -> SharedForm | None:
        return model.shared_form()  # type: ignore[operator,no-any-return]

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        return {matrix: model.sigma_table(matrix) for matrix in MATRICES}  # type: ignore[operator]


def factored_module(arch: Arch, tensors: dict[str, Tensor], path: str = "auto") -> FactoredDiT:
    """An empty `FactoredDiT` that these tensors load into; their own rank."""
    try:
        rank = tensors["genes.qkv.U"].shape[1]
    except KeyError:
        raise ArtifactError("these tensors have no shared factors (genes.qkv.U): no learngene of this method") from None
    return FactoredDiT(arch, rank, None, path)  # type: ignore[arg-type]


def _table(errors: dict[str, list[float]]) -> list[str]:
    rows = ["relative error of the decomposition, by matrix: mean | layer by layer"]
    for matrix, values in errors.items():
        layers = " ".join(f"{value:.3f}" for value in values)
        rows.append(f"  {matrix:6} {sum(values) / len(values):.3f} | {layers}")
    return rows
