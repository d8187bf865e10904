"""WAVE's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig


class WaveConfig(MethodConfig):
    """WAVE: shared templates, each layer's own Kronecker scalers."""

    name: Literal["wave"] = "wave"
    """WAVE."""
    side: int = Field(128, ge=1, le=2**16)
    """Side w of a template; it must divide every width that is wanted."""
    templates: int | None = Field(None, ge=1, le=2**20)
    """Templates of every matrix; none: as many as the matrix has tiles in the model that stage 1 trains."""
    order: Literal["scaler_template", "template_scaler"] = "scaler_template"
    """`kron(S, T)`, or `kron(T, S)`."""
    scalers: Literal["linear", "random", "identical", "segment", "aligned"] = "segment"
    """Where a target's scalers begin."""
