"""Auto-LG (the automatic learngene, arXiv 2305.02279): the first blocks of a trained model, random blocks behind.

The paper finds by meta-learning which layers are worth keeping; compared on transformers, it keeps the first 6. A
target of no more layers than are kept takes the first of them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig
from fine_dist.methods.heur_lg import KeptBlocks, KeptBlocksConfig


class AutoLgConfig(KeptBlocksConfig):
    """Auto-LG: the first blocks are kept, random blocks behind."""

    name: Literal["auto_lg"] = "auto_lg"
    """The automatic learngene."""
    keep: int = Field(6, ge=1)
    """Blocks that are kept, of an ancestor's."""


class AutoLg(KeptBlocks[AutoLgConfig]):
    """The first blocks."""

    Config: ClassVar[type[MethodConfig]] = AutoLgConfig
    label: ClassVar[str] = "Auto-LG"
    paper: ClassVar[str] = "Auto-LG, arXiv 2305.02279"
    summary: ClassVar[str] = "an ancestor's first blocks kept, scratch blocks behind"

    def places(self, source: int, num_layers: int) -> list[tuple[int, int]]:
        return [(layer, layer) for layer in range(min(self.config.keep, source, num_layers))]
