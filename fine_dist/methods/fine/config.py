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
    """Components R of every matrix. Default: the width D. More components fit an ancestor better and store more; 2D
    and 3D are worth trying where storage allows."""
    initial: Literal["joint", "decompose"] | None = None
    """Start of stage 1: `decompose` takes the CP decomposition of an ancestor's weights, `joint` random factors. The
    default decomposes the ancestor where one of stage 1's shape is given, and starts from random factors otherwise."""
    sweeps: int = Field(50, ge=1, le=1_000_000)
    """Greatest number of sweeps of alternating least squares over each matrix of the ancestor (initial: decompose)."""
    tolerance: float = Field(1e-5, gt=0)
    """Sweeps end early once one lowers the decomposition's relative error by less than this (initial: decompose)."""
    depths: tuple[Depth, ...] = ()
    """Depths that stage 1 also trains, such as 2 3 4 5 for an ancestor of 6 layers: every other step runs only the
    layers that a target of one of these depths, drawn at random, would start from. Targets then start close to trained
    models. Default: none, as published; list the depths that are wanted later."""
    path: Literal["auto", "composed", "factored"] = "auto"
    """How products are computed: `composed` makes W first, `factored` multiplies by V, sigma and U in turn. The default
    chooses for each matrix whichever needs fewer multiply-adds; results agree to rounding."""
    sigma: Literal["linear", "random", "identical", "segment", "aligned", "nearest"] | None = None
    """Start of a target's sigma, made from the learngene's over depth (docs/fanout.md explains each). Default:
    `nearest` for a learngene that was condensed at several `depths`, `aligned` for one that was decomposed from an
    ancestor, `segment` for one that was trained jointly."""
    trains: Literal["sigma", "sigma_and_biases"] = "sigma"
    """What stage 2 trains: sigma alone, as in the paper, or the layers' biases as well, which costs no storage beyond
    what a target has anyway and gives a lower loss. Targets whose biases train are not packed."""
