"""FINE (arXiv 2409.19289): `W(l) = U diag(sigma(l)) V^T` with U and V shared by all layers.

Stage 1 trains U, V, sigma and the shell on the plain diffusion loss (eq. 5), from random factors (`joint`) or from the
CP decomposition of an ancestor's weights (`decompose`). Stage 2 trains a target's sigma alone.

Choices where the paper does not say: R = D; each layer has its own biases, which are transferred to a target like sigma
and frozen in stage 2; sigma of adaLN starts at zero (adaLN-zero), that of the other matrices on a line in depth
(`line_in_depth`). The paper initializes a target's sigma at random (`random`); the default here is `segment`, `aligned`
or `nearest`. `depths`, which also trains shallower models in stage 1, is not in the paper.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.base import Condensation, Descent, M, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.fine.config import FineConfig
from fine_dist.methods.fine.cp import decompose
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.depth import INITIALS, nearest_layers
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT, SharedForm
from fine_dist.model.roles import of_role, train_only

log = logging.getLogger(__name__)


class FactoredTargets(Method[M]):
    """Base class of methods whose targets are a `FactoredDiT`: merging, packing and tables."""

    tables_of: ClassVar[str] = "sigma"

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        return model.merge()  # type: ignore[operator,no-any-return]

    def pack(self, model: nn.Module) -> SharedForm | None:
        return model.shared_form()  # type: ignore[operator,no-any-return]

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        return {matrix: model.sigma_table(matrix) for matrix in MATRICES}  # type: ignore[operator]


class Fine(FactoredTargets[FineConfig]):
    """FINE's three stages."""

    Config: ClassVar[type[MethodConfig]] = FineConfig
    label: ClassVar[str] = "FINE"
    paper: ClassVar[str] = "FINE, arXiv 2409.19289"
    summary: ClassVar[str] = "shared factors U, V; a target trains sigma alone"

    @property
    def traits(self) -> Traits:
        decomposes = self.config.initial == "decompose"
        return Traits(
            parents=("learngene",),
            varies=frozenset({"depth"}),
            condenses=True,
            ancestor="must" if decomposes else "may",
            same_shape=decomposes,
            carries_over=decomposes,
        )

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"sigma": tuple(INITIALS)}

    # --- stage 1 ----------------------------------------------------------------------------------------------------

    def given(self, ancestor: Arch | None, arch: Arch) -> Fine:
        if self.config.initial is not None:
            return self
        return Fine(self.config.model_copy(update={"initial": "decompose" if ancestor == arch else "joint"}))

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        if self.config.initial == "decompose" and ancestor is None:
            raise ArtifactError("method.initial decompose takes factors from an ancestor; give its folder as ancestor")
        module = self.blueprint(arch, generator)
        return Condensation(module, before_step=at_several_depths(module, self.config.depths))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> FactoredDiT:
        return FactoredDiT(arch, self.config.rank or arch.hidden_size, generator, self.config.path)

    @torch.no_grad()
    def carry_over(
        self, module: nn.Module, ancestor: DiT, generator: torch.Generator, device: torch.device
    ) -> dict[str, Any]:
        """CP of each matrix's weights over layers, into a `FactoredDiT`; block biases are copied.

        Returns:
            `carried_over`: a description. `decomposition_error`: the relative error of the weights by matrix and layer.
        """
        student: Any = module
        depth, state = range(ancestor.arch.num_layers), ancestor.state_dict()
        for name, own in of_role(student, "bias").items():
            own.copy_(state[name])
        errors: dict[str, list[float]] = {}
        for matrix in MATRICES:
            begun = time.monotonic()
            # One matrix type at a time, so that only one stack and its products are in memory.
            stack = torch.stack([state[f"blocks.{layer}.{matrix}.weight"] for layer in depth]).to(device)
            fit = decompose(
                stack,
                student.rank,
                sweeps=self.config.sweeps,
                tolerance=self.config.tolerance,
                generator=generator,
            )
            genes = student.factor(matrix)
            genes.U.copy_(fit.U)
            genes.V.copy_(fit.V)
            for layer in depth:
                student.sigma(matrix, layer).copy_(fit.sigma[layer])
            errors[matrix] = fit.error.tolist()
            log.info(
                "decomposed %s of %d layers (%d of %d matrices): relative error %.3f after %d sweeps, %.1f s",
                matrix, len(depth), len(errors), len(MATRICES), fit.history[-1], len(fit.history) - 1,
                time.monotonic() - begun,
            )  # fmt: skip
        means = ", ".join(f"{matrix} {sum(error) / len(error):.3f}" for matrix, error in errors.items())
        summary = f"block biases copied, block weights decomposed (mean relative error: {means})"
        return {"carried_over": summary, "decomposition_error": errors}

    # --- stage 2 ----------------------------------------------------------------------------------------------------

    def check_parent(self, parent: Artifact) -> None:
        super().check_parent(parent)
        rank = parent.tensors["genes.qkv.U"].shape[1]
        if self.config.rank not in (None, rank):
            raise ArtifactError(
                f"method.rank {self.config.rank}: the learngene {parent.folder} has rank {rank}, and its targets share "
                "its factors; leave method.rank out, or condense again with it"
            )

    def sigma_initial(self, made_by: Mapping[str, Any]) -> str:
        """The rule for a target's initial sigma, which depends on the settings of its learngene (`made_by`).

        Neighboring layers of a decomposed ancestor are unrelated, so their mean is meaningless, and a target's layer
        copies one of them.
        """
        if made_by.get("depths"):
            return self.config.sigma or "nearest"
        decomposed = made_by.get("initial") == "decompose"
        return self.config.sigma or ("aligned" if decomposed else "segment")

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        learngene = needed(parent)
        source: Any = learngene.module
        model = FactoredDiT(target, source.rank, generator, self.config.path)
        state = of_role(source, "gene", "shell")
        initial = INITIALS[self.sigma_initial(learngene.artifact.method)]
        for matrix in MATRICES:
            biases = torch.stack([source.bias(matrix, layer).detach() for layer in range(source.arch.num_layers)])
            table = source.sigma_table(matrix)
            for layer, (s, b) in enumerate(zip(*initial.layers(matrix, table, biases, target.num_layers, generator))):
                state[f"blocks.{layer}.{matrix}.sigma"] = s
                state[f"blocks.{layer}.{matrix}.bias"] = b
        model.load_state_dict(state)
        train_only(model, "scaler", *(("bias",) if self.config.trains == "sigma_and_biases" else ()))
        return Descent(model, "some")

    # --- results ----------------------------------------------------------------------------------------------------

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        return factored_module(arch, tensors, self.config.path)


def at_several_depths(module: DiT, depths: Sequence[int]) -> Callable[[int, torch.Generator], None] | None:
    """A hook that runs, in every other step, only the layers from which a target of a random depth would start.

    The published stage 1 trains the learngene at its own depth alone, and a subset of its layers does not work well
    before sigma has trained. This is not in the paper; docs/benchmark.md has measurements. None without depths.
    """
    if not depths:
        return None

    def before_step(step: int, generator: torch.Generator) -> None:
        module.active = None
        # Every other step at full depth, so that the learngene stays a good model at its own depth.
        if step % 2:
            depth = depths[int(torch.randint(len(depths), (1,), generator=generator))]
            module.active = nearest_layers(len(module.blocks), depth).tolist()

    return before_step


def factored_module(arch: Arch, tensors: dict[str, Tensor], path: str = "auto") -> FactoredDiT:
    """A `FactoredDiT` of the rank of these tensors, into which they can be loaded."""
    try:
        rank = tensors["genes.qkv.U"].shape[1]
    except KeyError:
        raise ArtifactError("these tensors have no shared factors (genes.qkv.U): no learngene of this method") from None
    return FactoredDiT(arch, rank, None, path)  # type: ignore[arg-type]
