"""Weight selection (Xu et al., arXiv 2311.18823): a smaller model starts with some of a trained model's weights.

The target's layers are the parent's first layers; units of every axis are selected at uniform spacing: by stride if the
parent's size is a multiple of the target's, else `round(linspace(0, large - 1, small))`. Values are copied unchanged.

*Choice*: the same units are selected wherever their space occurs (`methods.axes`): in qkv's rows by third, within a
third by head and within a head by unit; in adaLN's rows by sixth. The copy is therefore a sub-network. `rows: whole` is
the authors' own rule, each axis separately over its complete length. Position tables are fixed, of the target's width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.axes import Axis, axes_of
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import WeightSelectionConfig
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.dit import DiT


class WeightSelection(Method[WeightSelectionConfig]):
    """First layers, uniform units."""

    Config: ClassVar[type[MethodConfig]] = WeightSelectionConfig
    label: ClassVar[str] = "weight selection"
    paper: ClassVar[str] = "Weight selection, arXiv 2311.18823"
    summary: ClassVar[str] = "a smaller model takes a uniform choice of a trained one's weights"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset({"depth", "width"}))

    def check(self, parent: Artifact | None, target: Arch) -> None:
        super().check(parent, target)
        if parent is None:
            return
        for name in ("num_layers", "hidden_size", "num_heads"):
            large, small = getattr(parent.arch, name), getattr(target, name)
            if small > large:
                raise ArtifactError(
                    f"{parent.folder}: {name} is {large} in the parent, {small} in the target; method "
                    f"{self.config.name} selects among the parent's weights, so a target has at most as many"
                )
        if target.hidden_size // target.num_heads > parent.arch.hidden_size // parent.arch.num_heads:
            raise ArtifactError(
                f"{parent.folder}: a head has {parent.arch.hidden_size // parent.arch.num_heads} units in the parent, "
                f"{target.hidden_size // target.num_heads} in the target; give the target more heads (num_heads)"
            )

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        model = DiT(target, generator=generator)
        weights = source.state_dict()
        state = {}
        for name, initial in model.state_dict().items():
            tensor = weights[name].detach()
            for dim, axis in enumerate(axes_of(name)):
                units = self.choose(axis, source.arch, target, tensor.shape[dim], initial.shape[dim])
                tensor = tensor.index_select(dim, units)
            state[name] = tensor
        model.load_state_dict(state)
        return Descent(model)

    def choose(self, axis: Axis | None, source: Arch, target: Arch, large: int, small: int) -> Tensor:
        """Indices of the selected entries of an axis with `large` entries, int64 [small], ascending."""
        if axis is None or self.config.rows == "whole":
            return uniform(large, small)
        span = large // axis.groups
        if axis.space == "heads":
            size, target_size = source.hidden_size // source.num_heads, target.hidden_size // target.num_heads
            # Heads are selected first, then units within each head: attention of a head made of units from different
            # heads would be meaningless.
            heads = uniform(source.num_heads, target.num_heads)
            units = (heads[:, None] * size + uniform(size, target_size)).flatten()
        else:
            units = uniform(span, small // axis.groups)
        return (torch.arange(axis.groups)[:, None] * span + units).flatten()


def uniform(large: int, small: int) -> Tensor:
    """`small` of `large` indices at uniform spacing, int64, ascending: by stride if `small` divides `large`."""
    if large % small == 0:
        return torch.arange(small) * (large // small)
    return torch.linspace(0, large - 1, small, dtype=torch.float64).round().long()
