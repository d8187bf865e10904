"""Training from scratch: DiT's own initialisation (arXiv 2212.09748), the baseline of every table."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent

if TYPE_CHECKING:
    import torch

    from fine_dist.model.arch import Arch


class HeConfig(MethodConfig):
    """Scratch: DiT's own initialisation."""

    name: Literal["he"] = "he"
    """Scratch."""


class He(Method[HeConfig]):
    """Nothing is inherited."""

    Config: ClassVar[type[MethodConfig]] = HeConfig
    label: ClassVar[str] = "scratch"
    paper: ClassVar[str] = "DiT, arXiv 2212.09748"
    summary: ClassVar[str] = "from scratch"

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        from fine_dist.model.dit import DiT

        return Descent(DiT(target, generator=generator))
