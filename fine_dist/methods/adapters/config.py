"""Settings of the five adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig


class LoraConfig(MethodConfig):
    """LoRA: a trained product of two thin matrices beside each frozen one."""

    name: Literal["lora"] = "lora"
    """LoRA."""
    rank: int = Field(8, ge=1, le=2**16)
    """Columns of the thin matrices."""
    alpha: float = Field(8, gt=0)
    """The product counts alpha / rank times."""


class PissaConfig(MethodConfig):
    """PiSSA: LoRA on a matrix's principal components, its remainder frozen."""

    name: Literal["pissa"] = "pissa"
    """PiSSA."""
    rank: int = Field(8, ge=1, le=2**16)
    """Principal components that train."""


class OftConfig(MethodConfig):
    """OFT: inputs are rotated in blocks before each frozen matrix."""

    name: Literal["oft"] = "oft"
    """OFT."""
    block: int = Field(32, ge=2, le=2**16)
    """Side k of a block; where it does not divide the width, peft takes the nearest that does."""


class BoftConfig(MethodConfig):
    """BOFT: OFT with rotations in butterfly form, and a scale a row."""

    name: Literal["boft"] = "boft"
    """BOFT."""
    block: int = Field(4, ge=2, le=2**16)
    """Side b of a block; must divide the width. There is one butterfly factor."""


class VeraConfig(MethodConfig):
    """VeRA: LoRA with frozen random matrices shared by all, and trained scales."""

    name: Literal["vera"] = "vera"
    """VeRA."""
    rank: int = Field(256, ge=1, le=2**16)
    """Columns of the shared matrices."""
    d_initial: float = 0.1
    """Where the scales of components begin."""
    projection_seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seeds the shared matrices."""
