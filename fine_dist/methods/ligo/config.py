"""LiGO's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig


class LigoConfig(MethodConfig):
    """LiGO: a trained smaller model grows, depth first, then width; the growth is learned."""

    name: Literal["ligo"] = "ligo"
    """LiGO."""
    noise: float = Field(0.03, ge=0)
    """Width of the uniform noise that is added to the initial depth operators (stacked layers). Default: the authors'
    value."""
