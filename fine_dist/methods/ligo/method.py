"""LiGO (Wang et al., arXiv 2303.00980): a larger model as a learned linear function of a trained smaller one's weights.

Stage 2 trains the growth operators alone on the diffusion loss; then the target is grown, once, into a dense DiT.
Depth comes first: a layer is a mixture of the parent's layers, `sum_j w[l, j] W_j`, from stacking plus U(0, 0.03). Then
width: `B W B^T` with B = [I; M], M's rows uniform and of sum one; only M trains. The authors train with AdamW at 2e-4
for 100 steps (optim.lr, steps); their warm-up of 10,000 steps is not taken over.

*Choice*: operators are tied: one M for each space of a DiT (token stream, condition, time, heads, hidden), for all
layers and for q, k and v alike; a depth operator for each of the five matrices, which biases share. Attention's D is
one axis, as the authors take it: where heads change their size, new heads mix old ones.

A target is as deep and as wide as its parent, or more. Its artifact holds the parent's weights, layer on layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.ligo.config import LigoConfig
from fine_dist.methods.ligo.growth import GrownDiT
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.flops import ModelCost, outside_macs
from fine_dist.model.roles import train_only


class Ligo(Method[LigoConfig]):
    """Growth operators train, the parent's weights do not."""

    Config: ClassVar[type[MethodConfig]] = LigoConfig
    label: ClassVar[str] = "LiGO"
    paper: ClassVar[str] = "LiGO, arXiv 2303.00980"
    summary: ClassVar[str] = "a larger model grows from a trained smaller one; growth is learned"
    tables_of: ClassVar[str] = "mixture of the parent's layers"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset({"depth", "width"}))

    def check(self, parent: Artifact | None, target: Arch) -> None:
        super().check(parent, target)
        for name in ("num_layers", "hidden_size") if parent else ():
            small, large = getattr(parent.arch, name), getattr(target, name)  # type: ignore[union-attr]
            if large < small:
                raise ArtifactError(
                    f"{parent.folder}: {name} is {small} in the parent, {large} in the target; "  # type: ignore[union-attr]
                    f"method {self.config.name} grows its parent, so a target has at least as many"
                )

    def smallest(self, target: Arch) -> Arch:
        return target  # none is shallower than its parent

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        arch = source.arch
        model = GrownDiT(target, arch.hidden_size, arch.num_layers, self.config.noise, generator)
        model.take(source)
        return Descent(train_only(model, "scaler"), "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        try:
            layers, _, width = tensors["sources.qkv.weight"].shape
        except KeyError:
            raise ArtifactError("these tensors hold nothing to grow from (sources.qkv.weight)") from None
        parents = arch.model_copy(update={"num_classes": tensors["sources.label.weight"].shape[1] - 1})
        model = GrownDiT(parents, width, layers)
        if "label.weight" in tensors:  # labels of the target's own, which are not grown
            model.label = nn.Embedding(arch.num_classes + 1, arch.hidden_size)
        model.arch = arch
        return model

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        return model.merge()  # type: ignore[operator,no-any-return]

    def cost(self, model: nn.Module, batch: int = 1) -> ModelCost:
        cost = super().cost(model, batch)
        # what is outside the blocks is grown too: its operators' gradients come through gradients of its weights
        return replace(cost, training=cost.training + 2 * outside_macs(model.arch))  # type: ignore[arg-type]

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        sources: Any = model.sources
        return {matrix: sources[matrix].depth.detach().float().cpu() for matrix in MATRICES}
