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
    """Components of every matrix that single groups of classes use, counted over all groups. Default: half the
    width."""
    groups: int = Field(2, ge=1, le=2**16)
    """Number of groups of classes; a sample uses the tailors of its class's group."""
    table: tuple[Group, ...] | None = None
    """The group of each class, from 0. Default: classes that follow each other form groups of near-equal size."""
    transfer: Literal["keep", "redraw"] = "keep"
    """Start of a target's tailors: `keep` takes the learngene's, `redraw` draws new ones, for a large shift of
    domain."""
    trains: Literal["tailors", "tailors_and_shell"] = "tailors"
    """What a transfer trains: tailors and the label embedder, or the other embedders and the final layer as well."""
    deploy: tuple[Group, ...] | None = None
    """Groups whose tailors a target keeps, ready for use without training. Default: the target trains tailors and label
    embedder."""
