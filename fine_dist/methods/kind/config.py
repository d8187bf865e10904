"""KIND's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig

Group = Annotated[int, Field(ge=0)]


class KindConfig(MethodConfig):
    """KIND: learngenes for all classes, tailors for groups of classes, behind a class gate."""

    name: Literal["kind"] = "kind"
    """KIND."""
    learngenes: int | None = Field(None, ge=1, le=2**16)
    """Components of every matrix that all classes use. Default: half the width."""
    tailors: int | None = Field(None, ge=0, le=2**16)
    """Components of every matrix that only one group of classes uses, summed over all groups. Default: half the
    width."""
    groups: int = Field(2, ge=1, le=2**16)
    """Number of groups of classes; a sample uses the tailors of its class's group."""
    table: tuple[Group, ...] | None = None
    """The group of each class, from 0. Default: consecutive classes form groups of near-equal size."""
    transfer: Literal["keep", "redraw"] = "keep"
    """Initial tailors of a target: `keep` copies the learngene's, `redraw` draws new random ones, for a large domain
    shift."""
    trains: Literal["tailors", "tailors_and_shell"] = "tailors"
    """Parameters that a transfer trains: tailors and the label embedder, or also the other embedders and the final
    layer."""
    deploy: tuple[Group, ...] | None = None
    """Groups whose tailors a target keeps for use without training. Default: the target trains tailors and label
    embedder."""
