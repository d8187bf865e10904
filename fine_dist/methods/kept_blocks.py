"""Heur-LG (the heuristic learngene, arXiv 2106.06788): the last blocks of a trained model, random blocks in front.

The last 3 of 12 blocks are what high layers have learned and what is kept; a target's other blocks start from scratch.
There is no stage 1 and no stage 2: a target is an ordinary DiT at once. A target of no more layers than are kept takes
the last of them. As for every method, what is outside the blocks is copied.
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
    """A target takes some blocks of an ordinary model as they are; the rest are scratch."""

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset({"depth"}))

    @abstractmethod
    def places(self, source: int, num_layers: int) -> list[tuple[int, int]]:
        """(layer of the target, the ancestor's layer that it is): which blocks are kept, and where they go."""

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent)
        model = DiT(target, generator=generator)
        state = {**model.state_dict(), **of_role(source.module, "shell")}
        theirs = source.module.state_dict()
        for layer, taken in self.places(source.arch.num_layers, target.num_layers):
            own = f"blocks.{layer}."
            state |= {name: theirs[f"blocks.{taken}.{name[len(own) :]}"] for name in state if name.startswith(own)}
        model.load_state_dict(state)
        return Descent(model)


class HeurLg(KeptBlocks[HeurLgConfig]):
    """The last blocks."""

    Config: ClassVar[type[MethodConfig]] = HeurLgConfig
    label: ClassVar[str] = "Heur-LG"
    paper: ClassVar[str] = "Learngene, arXiv 2106.06788"
    summary: ClassVar[str] = "an ancestor's last blocks kept, scratch blocks in front"

    def places(self, source: int, num_layers: int) -> list[tuple[int, int]]:
        kept = min(self.config.keep, source, num_layers)
        return [(num_layers - back, source - back) for back in range(kept, 0, -1)]


class AutoLg(KeptBlocks[AutoLgConfig]):
    """The first blocks."""

    Config: ClassVar[type[MethodConfig]] = AutoLgConfig
    label: ClassVar[str] = "Auto-LG"
    paper: ClassVar[str] = "Auto-LG, arXiv 2305.02279"
    summary: ClassVar[str] = "an ancestor's first blocks kept, scratch blocks behind"

    def places(self, source: int, num_layers: int) -> list[tuple[int, int]]:
        return [(layer, layer) for layer in range(min(self.config.keep, source, num_layers))]
