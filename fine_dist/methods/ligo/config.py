"""LiGO's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig


class LigoConfig(MethodConfig):
    """LiGO: learned growth of a smaller model, depth then width."""

    name: Literal["ligo"] = "ligo"
    """LiGO."""
    noise: float = Field(0.03, ge=0)
    """Width of the uniform noise on depth operators."""
