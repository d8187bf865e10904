"""Heur-LG (the heuristic learngene, arXiv 2106.06788): the last blocks of a trained model, random blocks in front.

The last blocks (3 of 12 in the paper) are inherited; the target's other blocks start from scratch. There is no stage 1
and no stage 2: a target is an ordinary DiT at once. A target of no more layers than are inherited takes the last ones.
Embedders and the final layer are copied, as by every method. Auto-LG inherits the first blocks instead.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, TypeVar

import torch

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import AutoLgConfig, HeurLgConfig, KeptBlocksConfig
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.model.roles import of_role

K = TypeVar("K", bound=KeptBlocksConfig)


class KeptBlocks(Method[K]):
    """A target copies some blocks of an ordinary model; the others start from scratch."""

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset({"depth"}))

    @abstractmethod
    def copied_layers(self, source: int, num_layers: int) -> list[tuple[int, int]]:
        """(layer of the target, layer of the ancestor that it copies) of all copied layers.

        Args:
            source: Layers of the ancestor.
            num_layers: Layers of the target.
        """

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent)
        model = DiT(target, generator=generator)
        state = {**model.state_dict(), **of_role(source.module, "shell")}
        weights = source.module.state_dict()
        for layer, origin in self.copied_layers(source.arch.num_layers, target.num_layers):
            prefix = f"blocks.{layer}."
            names = [name for name in state if name.startswith(prefix)]
            state |= {name: weights[f"blocks.{origin}.{name.removeprefix(prefix)}"] for name in names}
        model.load_state_dict(state)
        return Descent(model)


class HeurLg(KeptBlocks[HeurLgConfig]):
    """The ancestor's last blocks are copied."""

    Config: ClassVar[type[MethodConfig]] = HeurLgConfig
    label: ClassVar[str] = "Heur-LG"
    paper: ClassVar[str] = "Learngene, arXiv 2106.06788"
    summary: ClassVar[str] = "an ancestor's last blocks kept, scratch blocks in front"

    def copied_layers(self, source: int, num_layers: int) -> list[tuple[int, int]]:
        num_kept = min(self.config.keep, source, num_layers)
        return [(num_layers - back, source - back) for back in range(num_kept, 0, -1)]


class AutoLg(KeptBlocks[AutoLgConfig]):
    """The ancestor's first blocks are copied."""

    Config: ClassVar[type[MethodConfig]] = AutoLgConfig
    label: ClassVar[str] = "Auto-LG"
    paper: ClassVar[str] = "Auto-LG, arXiv 2305.02279"
    summary: ClassVar[str] = "an ancestor's first blocks kept, scratch blocks behind"

    def copied_layers(self, source: int, num_layers: int) -> list[tuple[int, int]]:
        return [(layer, layer) for layer in range(min(self.config.keep, source, num_layers))]
