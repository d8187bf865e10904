"""A control: only the embedders and the final layer are inherited; the blocks start from scratch.

Methods that condense also copy these parts, so a gain over this control comes from the blocks.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import CopiedShellConfig
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.dit import DiT
from fine_dist.model.roles import of_role


class CopiedShell(Method[CopiedShellConfig]):
    """Copies the embedders and the final layer."""

    Config: ClassVar[type[MethodConfig]] = CopiedShellConfig
    label: ClassVar[str] = "copied shell"
    paper: ClassVar[str] = "control: a learngene's shell alone"
    summary: ClassVar[str] = "control: scratch blocks, the rest inherited"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("learngene", "model"), varies=frozenset({"depth"}))

    def check_parent(self, parent: Artifact) -> None:
        """Any parent has a shell."""

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        model = DiT(target, generator=generator)
        model.load_state_dict({**model.state_dict(), **of_role(needed(parent).module, "shell")})
        return Descent(model)
