"""KIND's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fine_dist.methods.base import MethodConfig

Group = Annotated[int, Field(ge=0)]


class KindConfig(MethodConfig):
    """KIND: learngenes and class-gated tailors."""

    name: Literal["kind"] = "kind"
    """KIND."""
    learngenes: int | None = Field(None, ge=1, le=2**16)
    """Components of every matrix that all classes use; none: half the width."""
    tailors: int | None = Field(None, ge=0, le=2**16)
    """Components of every matrix that only a group of classes uses, in all groups; none: half the width."""
    groups: int = Field(2, ge=1, le=2**16)
    """Groups of classes; a sample uses the tailors of its own group."""
    table: tuple[Group, ...] | None = None
    """The group of each class; none: classes that follow each other form near-equal groups."""
    transfer: Literal["keep", "redraw"] = "keep"
    """A target's tailors start as they are in the learngene, or (for a large shift of domain) drawn anew."""
    trains: Literal["tailors", "tailors_and_shell"] = "tailors"
    """What a transfer trains: tailors and the label embedder, or all other embedders and the final layer as well."""
    deploy: tuple[Group, ...] | None = None
    """Groups whose tailors a target keeps, and nothing trains; none: the target trains tailors and label embedder."""
