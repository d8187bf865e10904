"""Settings of the two methods that stitch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fine_dist.methods.base import MethodConfig


class StitchingConfig(MethodConfig):
    """Settings of the methods that stitch anchors of several widths."""

    widths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Widths of the anchors as fractions of the width of `arch`, ascending; the last is 1. The default gives 192, 384
    and 768 for DiT-B."""
    route: str | None = None
    """The only route that a target keeps: an anchor (`1`), or block 3 of anchor 0 into block 2 of anchor 1 (`0.3-1.2`).
    Default: all routes."""

    @field_validator("route", mode="before")
    @classmethod
    def _word(cls, route: Any) -> Any:
        return str(route) if isinstance(route, int) else route  # `1` on a command line is a number

    @field_validator("widths")
    @classmethod
    def _rising(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if len(widths) < 2 or list(widths) != sorted(set(widths)) or widths[0] <= 0 or widths[-1] != 1:
            raise ValueError(f"{list(widths)} are not widths: give two fractions or more, ascending, the last one 1")
        return widths


class SnnetConfig(StitchingConfig):
    """SN-Net: anchors of several widths, stitched by least squares."""

    name: Literal["snnet"] = "snnet"
    """SN-Net."""
    images: int = Field(100, ge=1, le=1_000_000)
    """Number of images for the least-squares maps between anchors. Default: the paper's value."""


class LearngenePoolConfig(StitchingConfig):
    """Learngene Pool: distilled anchors of several widths, stitched by the maps of the distillation."""

    name: Literal["learngene_pool"] = "learngene_pool"
    """Learngene Pool."""
