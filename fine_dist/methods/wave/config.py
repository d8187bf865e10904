"""WAVE's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig


class WaveConfig(MethodConfig):
    """WAVE: templates shared by all layers, Kronecker scalers for each layer."""

    name: Literal["wave"] = "wave"
    """WAVE."""
    side: int = Field(128, ge=1, le=2**16)
    """Side w of a template; it must divide the width of stage 1 and of every target. 128 divides all named widths."""
    templates: int | None = Field(None, ge=1, le=2**20)
    """Number of templates for each matrix. Default: the number of tiles of the matrix in stage 1, which can represent
    the weights of any one layer."""
    order: Literal["scaler_template", "template_scaler"] = "scaler_template"
    """Order of the Kronecker product: `kron(S, T)` tiles scaled templates, `kron(T, S)` spreads a template's
    entries."""
    scalers: Literal["linear", "random", "identical", "segment", "aligned"] = "segment"
    """Initial scalers of a target over depth: `linear`, `segment` and `aligned` transfer the learngene's scalers;
    `random` and `identical` are controls (docs/fanout.md)."""
