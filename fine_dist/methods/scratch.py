"""Training from scratch: DiT's own initialization (arXiv 2212.09748), the baseline of every table."""

from __future__ import annotations

from typing import ClassVar

import torch

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent
from fine_dist.methods.settings import ScratchConfig
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT


class Scratch(Method[ScratchConfig]):
    """Nothing is inherited."""

    Config: ClassVar[type[MethodConfig]] = ScratchConfig
    label: ClassVar[str] = "scratch"
    paper: ClassVar[str] = "DiT, arXiv 2212.09748"
    summary: ClassVar[str] = "from scratch"

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        return Descent(DiT(target, generator=generator))
