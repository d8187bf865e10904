"""FINE's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.core.config import Depth
from fine_dist.methods.base import MethodConfig


class FineConfig(MethodConfig):
    """FINE: factors U and V shared by all layers, a vector sigma for each layer."""

    name: Literal["fine"] = "fine"
    """FINE, arXiv 2409.19289."""
    rank: int | None = Field(None, ge=1, le=2**16)
    """Components R of every matrix. Default: the width D. More components fit an ancestor better and need more storage;
    2D and 3D are worth trying."""
    initial: Literal["joint", "decompose"] | None = None
    """Start of stage 1: `decompose` takes the CP decomposition of an ancestor's weights, `joint` random factors.
    Default: `decompose` if an ancestor with the shape of stage 1 is given, otherwise `joint`."""
    sweeps: int = Field(50, ge=1, le=1_000_000)
    """Maximum number of sweeps of alternating least squares over each matrix of the ancestor (initial: decompose)."""
    tolerance: float = Field(1e-5, gt=0)
    """Sweeps end when one lowers the decomposition's relative error by less than this (initial: decompose)."""
    depths: tuple[Depth, ...] = ()
    """Depths that stage 1 also trains, such as 2 3 4 5 for an ancestor of 6 layers: every other step runs only the
    layers from which a target of a random one of these depths would start. Targets then start close to trained models.
    Default: none, as published; list the depths of the targets that you plan."""
    path: Literal["auto", "composed", "factored"] = "auto"
    """Computation of products: `composed` computes W first, `factored` multiplies by V, sigma and U in turn. `auto`
    uses for each matrix the one with fewer multiply-adds; results agree up to rounding."""
    sigma: Literal["linear", "random", "identical", "segment", "aligned", "nearest"] | None = None
    """Rule that computes a target's initial sigma from the learngene's (docs/fanout.md explains each). Default:
    `nearest` for a learngene that was condensed at several `depths`, `aligned` for one that was decomposed from an
    ancestor, `segment` for one that was trained jointly."""
    trains: Literal["sigma", "sigma_and_biases"] = "sigma"
    """Parameters that stage 2 trains: sigma alone, as in the paper, or also the layers' biases, which needs no extra
    storage and gives a lower loss. Targets whose biases train are not packed."""
