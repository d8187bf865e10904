"""A control: only what is outside the blocks is inherited (embedders, final layer); the blocks start from scratch.

FINE gets the same copy of those parts, so a gain over this control is the factors' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fine_dist.methods.base import Method, MethodConfig, check_descent

if TYPE_CHECKING:
    import torch

    from fine_dist.model.artifact import Artifact
    from fine_dist.model.dit import DiT
    from fine_dist.model.zoo import Arch


class OutsideConfig(MethodConfig):
    """Control: scratch blocks, everything outside them copied from FINE's learngene."""

    name: Literal["outside"] = "outside"
    """Control without factors."""


class Outside(Method[OutsideConfig]):
    """Copies the embedders and the final layer."""

    Config: ClassVar[type[MethodConfig]] = OutsideConfig
    paper: ClassVar[str] = "control for FINE, arXiv 2409.19289"
    summary: ClassVar[str] = "control: scratch blocks, the rest inherited"

    def descend(self, artifact: Artifact | None, target: Arch, generator: torch.Generator) -> DiT:
        from fine_dist.model.dit import DiT, outside_blocks

        artifact = check_descent(artifact, target, "fine")
        model = DiT(target, generator=generator)
        model.load_state_dict({**model.state_dict(), **outside_blocks(artifact.tensors)})
        return model
