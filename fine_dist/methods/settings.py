"""Settings of the methods that are one file each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Depth
from fine_dist.methods.base import MethodConfig


class ScratchConfig(MethodConfig):
    """Training from scratch: DiT's own initialization."""

    name: Literal["scratch"] = "scratch"
    """Name of the method."""


class CopiedShellConfig(MethodConfig):
    """Control: embedders and final layer are copied from the parent, blocks start from scratch."""

    name: Literal["copied_shell"] = "copied_shell"
    """Control without factors."""


class RandomGenesConfig(MethodConfig):
    """Control: FINE's stage 2 with random instead of learned factors; embedders and final layer as in FINE."""

    name: Literal["random_genes"] = "random_genes"
    """Control without learned factors."""


class MimeticConfig(MethodConfig):
    """Mimetic initialization: products of attention weights resemble those of trained models."""

    name: Literal["mimetic"] = "mimetic"
    """Mimetic."""
    alpha_qk: float = Field(0.7, ge=0)
    """Weight of the noise in the initial product of queries and keys. Default: the paper's value."""
    beta_qk: float = Field(0.7, ge=0)
    """Weight of the identity in the initial product of queries and keys. Default: the paper's value."""
    alpha_vo: float = Field(0.4, ge=0)
    """Weight of the noise in the initial product of values and projection. Default: the paper's value."""
    beta_vo: float = Field(0.4, ge=0)
    """Weight of the negative identity in the initial product of values and projection. Default: the paper's value."""


class WeightSelectionConfig(MethodConfig):
    """Weight selection: a smaller model takes first layers and evenly spaced units of a larger one."""

    name: Literal["weight_selection"] = "weight_selection"
    """Weight selection."""
    rows: Literal["grouped", "whole"] = "grouped"
    """How units are selected: `grouped` selects the same units wherever they occur, by head in attention, so that the
    copy is a sub-network; `whole` selects along every axis separately, as the authors do."""


class KeptBlocksConfig(MethodConfig):
    """Some blocks of a target are copied from an ancestor; the others start from scratch."""

    keep: int = Field(3, ge=1, le=1_000)
    """Number of blocks that a target copies from its ancestor; a target with fewer blocks copies all of its blocks."""


class HeurLgConfig(KeptBlocksConfig):
    """Heur-LG: the ancestor's last blocks are copied, behind random ones."""

    name: Literal["heur_lg"] = "heur_lg"
    """The heuristic learngene."""


class AutoLgConfig(KeptBlocksConfig):
    """Auto-LG: the ancestor's first blocks are copied, in front of random ones."""

    name: Literal["auto_lg"] = "auto_lg"
    """The automatic learngene."""
    keep: int = Field(6, ge=1, le=1_000)
    """Number of blocks that a target copies from its ancestor; a target with fewer blocks copies all of its blocks."""


class SvdConfig(MethodConfig):
    """Per-layer SVD: each layer keeps its own top singular components."""

    name: Literal["svd"] = "svd"
    """Per-layer singular value decomposition."""
    rank: int | None = Field(None, ge=1, le=2**16)
    """Singular components of every matrix of a layer. Default: as many as `budget` allows."""
    budget: int | None = Field(None, ge=1)
    """Maximum count of numbers in the components of all layers. Default: the size of FINE's shared factors of rank D,
    so that both methods are compared at equal storage."""

    @model_validator(mode="after")
    def _one_of_them(self) -> SvdConfig:
        if self.rank and self.budget:
            raise ValueError(f"rank {self.rank} and budget {self.budget} both set the number of components; give one")
        return self


class SvdiffConfig(MethodConfig):
    """SVDiff: shifts of singular values train; everything else is frozen."""

    name: Literal["svdiff"] = "svdiff"
    """SVDiff."""


class DiffFitConfig(MethodConfig):
    """DiffFit: biases, label embedder and scales of residual branches train."""

    name: Literal["difffit"] = "difffit"
    """DiffFit."""
    scaled: Literal["first_half", "all"] = "first_half"
    """Blocks whose residual branches get a trained scale: the first half (14 of 28 in the paper) or all."""


class TlegConfig(MethodConfig):
    """TLEG: all layers lie on a line between two shared blocks."""

    name: Literal["tleg"] = "tleg"
    """TLEG."""
    auxiliary_layers: Depth | None = 12
    """Depth of the model that stage 1 trains, independent of the ancestor's depth; the paper uses 12. None takes the
    depth of `arch`."""


class SwsConfig(MethodConfig):
    """SWS: the layers of a stage share one block; a single stage is Share Init."""

    name: Literal["sws"] = "sws"
    """Stage-wise sharing."""
    stages: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((3, 3, 4, 3, 3), min_length=1)
    """Layers in each stage of the model that stage 1 trains, whose depth is their sum. One entry is Share Init."""


class PrunedConfig(MethodConfig):
    """Depth pruning: some layers of a trained model are copied unchanged."""

    name: Literal["pruned"] = "pruned"
    """Depth pruning; the learned choice is TinyFusion's, arXiv 2412.01199."""
    choose: Literal["first", "even", "best", "learned"] = "first"
    """Which layers are kept: the `first` ones, `even`ly spaced ones, the `best` by the diffusion loss of the remaining
    model on samples of the data, or a choice `learned` in stage 2. The best layers before training need not be the best
    after training. A target deeper than its ancestor repeats layers and ignores this setting."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Numbers of the kept layers, from 0, in order; overrides `choose`. Default: the layers that `choose` selects."""
    samples: int = Field(256, ge=1, le=1_000_000)
    """Number of samples of the data on which `best` measures the loss."""
    groups: int | None = Field(None, ge=1, le=2**16)
    """Number of consecutive groups of layers, which all keep the same number of layers (`learned`); it must divide both
    depths. Default: the largest number with four layers or more in each group."""
    rank: int = Field(8, ge=1, le=2**16)
    """Rank of the weight updates that simulate later training while the choice is learned."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the Gumbel softmax (`learned`); lower values make the gradients of the choice noisier."""


class FrontConfig(MethodConfig):
    """FRONT: low frequencies of a trained model's weights, resampled to any depth and width."""

    name: Literal["front"] = "front"
    """FRONT, arXiv 2603.07523."""
    keep: float = Field(1.0, gt=0, le=1)
    """Fraction of the frequencies along every axis that is kept. At 1, a target of the parent's shape is a copy of the
    parent; lower values give a smaller learngene, whose targets need more training."""


class SweetConfig(MethodConfig):
    """SWEET: one Tucker core shared by all matrices, scalers over depth and over width."""

    name: Literal["sweet"] = "sweet"
    """SWEET, arXiv 2601.19694."""
    components: int = Field(24, ge=1, le=2**16)
    """Number of components of the shared core. The default stores about as many numbers as FINE's factors of rank D;
    18 L components can represent any L layers exactly."""
    side: int | None = Field(None, ge=1, le=2**16)
    """Side of a component. Default: the width of stage 1. Smaller values give a smaller learngene, whose weights have
    at most this rank."""
    scaling: float = Field(0.1, ge=0, lt=1)
    """Random scaling of the core's width dimensions in stage 1: at every step each component is multiplied by a random
    number between 1 - scaling and 1 + scaling. It prepares the core for other widths; 0 turns it off."""
    scalers: Literal["linear", "random", "identical", "segment", "aligned"] = "segment"
    """Initial scalers of a target over depth: `linear`, `segment` and `aligned` transfer the learngene's scalers;
    `random` and `identical` are controls (docs/fanout.md)."""
