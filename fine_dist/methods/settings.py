"""Settings of the methods that are one file each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Depth
from fine_dist.methods.base import MethodConfig


class ScratchConfig(MethodConfig):
    """Scratch: DiT's own initialisation."""

    name: Literal["scratch"] = "scratch"
    """Scratch."""


class CopiedShellConfig(MethodConfig):
    """Control: scratch blocks, everything outside them copied from a learngene or model."""

    name: Literal["copied_shell"] = "copied_shell"
    """Control without factors."""


class RandomGenesConfig(MethodConfig):
    """Control: random U and V, trained sigma, everything outside the blocks copied from FINE's learngene."""

    name: Literal["random_genes"] = "random_genes"
    """Control without learned factors."""


class MimeticConfig(MethodConfig):
    """Mimetic initialisation: attention's products near a multiple of the identity."""

    name: Literal["mimetic"] = "mimetic"
    """Mimetic."""
    alpha_qk: float = Field(0.7, ge=0)
    """Noise in queries' product with keys."""
    beta_qk: float = Field(0.7, ge=0)
    """Identity in queries' product with keys."""
    alpha_vo: float = Field(0.4, ge=0)
    """Noise in values' product with the projection."""
    beta_vo: float = Field(0.4, ge=0)
    """Negative identity in values' product with the projection."""


class WeightSelectionConfig(MethodConfig):
    """Weight selection: a uniform choice of a larger model's weights."""

    name: Literal["weight_selection"] = "weight_selection"
    """Weight selection."""
    rows: Literal["grouped", "whole"] = "grouped"
    """Units by third, head and sixth, alike wherever they occur; or every axis by itself, as the authors do."""


class KeptBlocksConfig(MethodConfig):
    """Whole blocks of an ancestor are kept."""

    keep: int = Field(3, ge=1, le=1_000)
    """Blocks that are kept, of an ancestor's."""


class HeurLgConfig(KeptBlocksConfig):
    """Heur-LG: the last blocks are kept, random blocks in front."""

    name: Literal["heur_lg"] = "heur_lg"
    """The heuristic learngene."""


class AutoLgConfig(KeptBlocksConfig):
    """Auto-LG: the first blocks are kept, random blocks behind."""

    name: Literal["auto_lg"] = "auto_lg"
    """The automatic learngene."""
    keep: int = Field(6, ge=1, le=1_000)
    """Blocks that are kept, of an ancestor's."""


class SvdConfig(MethodConfig):
    """SVD: each layer's own top components."""

    name: Literal["svd"] = "svd"
    """Per-layer singular value decomposition."""
    rank: int | None = Field(None, ge=1, le=2**16)
    """Components of every matrix of a layer; none: as many as the budget has room for."""
    budget: int | None = Field(None, ge=1)
    """Numbers that all layers' components may take; none: those of one pair of shared factors of rank D."""

    @model_validator(mode="after")
    def _one_of_them(self) -> SvdConfig:
        if self.rank and self.budget:
            raise ValueError(f"rank {self.rank} and budget {self.budget} both say how many components; give one")
        return self


class SvdiffConfig(MethodConfig):
    """SVDiff: shifts of singular values."""

    name: Literal["svdiff"] = "svdiff"
    """SVDiff."""


class DiffFitConfig(MethodConfig):
    """DiffFit: biases, labels and scales of residual branches."""

    name: Literal["difffit"] = "difffit"
    """DiffFit."""
    scaled: Literal["first_half", "all"] = "first_half"
    """Blocks whose branches have a scale: the first 14 of 28, or all."""


class TlegConfig(MethodConfig):
    """TLEG: layers on a line between two shared blocks."""

    name: Literal["tleg"] = "tleg"
    """TLEG."""
    auxiliary_layers: Depth | None = 12
    """Layers of the model that stage 1 trains; none: as many as `arch` has."""


class SwsConfig(MethodConfig):
    """SWS: layers of a stage share one block; one stage is Share Init."""

    name: Literal["sws"] = "sws"
    """Stage-wise sharing."""
    stages: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((3, 3, 4, 3, 3), min_length=1)
    """Layers of each stage of the model that stage 1 trains, whose depth is their sum; a single one is Share Init."""


class PrunedConfig(MethodConfig):
    """Depth pruning: some layers of a trained model are kept as they are."""

    name: Literal["pruned"] = "pruned"
    """Depth pruning; the learned choice is TinyFusion's, arXiv 2412.01199."""
    choose: Literal["first", "even", "best", "learned"] = "first"
    """Which layers are kept: the `first` ones, `even`ly spaced ones, the `best` by the diffusion loss of what is left,
    measured on samples of the data, or a choice `learned` in stage 2. Layers that look best untrained need not be best
    after training. A target deeper than its ancestor repeats layers, whatever is set here."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """The layers that are kept, by their numbers from 0, in order; overrules `choose`."""
    samples: int = Field(256, ge=1, le=1_000_000)
    """Number of samples of the data on which `best` measures the loss."""
    groups: int | None = Field(None, ge=1, le=2**16)
    """Number of consecutive groups of layers that each keep equally many (`learned`); it divides both depths. Default:
    as many as leave groups of four layers or more."""
    rank: int = Field(8, ge=1, le=2**16)
    """Rank of the updates that stand for later training while the choice is learned."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the Gumbel softmax (`learned`); lower values make the gradients of the choice noisier."""
