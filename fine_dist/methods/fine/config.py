"""FINE's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig


class FineConfig(MethodConfig):
    """FINE: factors shared by all layers, sigma a layer's own."""

    name: Literal["fine"] = "fine"
    """FINE."""
    rank: int | None = Field(None, ge=1)
    """Components R of every matrix; none: the width D."""
    initial: Literal["joint", "decompose"] = "joint"
    """Stage 1 begins with random factors, or with the CP decomposition of an ancestor."""
    sweeps: int = Field(50, ge=1)
    """Sweeps of alternating least squares at most (initial: decompose)."""
    tolerance: float = Field(1e-5, gt=0)
    """Sweeps end once one lowers the relative error by less (initial: decompose)."""
    path: Literal["auto", "composed", "factored"] = "auto"
    """How products are computed: by whichever needs fewer multiply-adds, or always one way."""
    sigma: Literal["linear", "random", "identical", "segment", "aligned"] | None = None
    """Where a target's sigma begins; none: `segment`, or `aligned` where factors were decomposed from an ancestor."""
