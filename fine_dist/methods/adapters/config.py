"""Settings of the five adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig


class LoraConfig(MethodConfig):
    """LoRA: a trained product of two thin matrices is added to each frozen matrix."""

    name: Literal["lora"] = "lora"
    """LoRA."""
    rank: int = Field(8, ge=1, le=2**16)
    """Rank of the trained update of every matrix; a larger rank costs memory and may fit a distant domain better."""
    alpha: float = Field(8, gt=0)
    """Scale of the trained update: it is multiplied by alpha / rank. The default gives 1 at the default rank."""


class PissaConfig(MethodConfig):
    """PiSSA: the principal components of each matrix train, its remainder is frozen."""

    name: Literal["pissa"] = "pissa"
    """PiSSA."""
    rank: int = Field(8, ge=1, le=2**16)
    """Number of principal components of every matrix that train; the others are frozen."""


class OftConfig(MethodConfig):
    """OFT: inputs are rotated in blocks before each frozen matrix."""

    name: Literal["oft"] = "oft"
    """OFT."""
    block: int = Field(32, ge=2, le=2**16)
    """Side of a rotated block of features; if it does not divide the width, peft takes the nearest divisor."""


class BoftConfig(MethodConfig):
    """BOFT: rotations in butterfly form before each frozen matrix, and a scale for each of its rows."""

    name: Literal["boft"] = "boft"
    """BOFT."""
    block: int = Field(4, ge=2, le=2**16)
    """Side of a rotated block of features; it must divide the width. There is one butterfly factor."""


class VeraConfig(MethodConfig):
    """VeRA: trained scales of random projections that all matrices share."""

    name: Literal["vera"] = "vera"
    """VeRA."""
    rank: int = Field(256, ge=1, le=2**16)
    """Rank of the shared random projections; only their scales train, so it may be large."""
    d_initial: float = 0.1
    """Initial value of the trained scales of the projections' components. Default: the paper's value."""
    projection_seed: int = Field(0, ge=0, le=2**63 - 1)
    """Random seed of the shared projections, which are stored once with a target."""
