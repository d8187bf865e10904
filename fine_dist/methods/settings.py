"""Settings of the methods that are one file each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Depth
from fine_dist.methods.base import MethodConfig


class ScratchConfig(MethodConfig):
    """Training from scratch: DiT's own initialization."""

    name: Literal["scratch"] = "scratch"
    """Scratch."""


class CopiedShellConfig(MethodConfig):
    """Control: embedders and final layer copied from the parent, blocks from scratch."""

    name: Literal["copied_shell"] = "copied_shell"
    """Control without factors."""


class RandomGenesConfig(MethodConfig):
    """Control: FINE's stage 2 with random instead of learned factors; embedders and final layer are FINE's."""

    name: Literal["random_genes"] = "random_genes"
    """Control without learned factors."""


class MimeticConfig(MethodConfig):
    """Mimetic initialization: attention's weights have the products that trained ones have."""

    name: Literal["mimetic"] = "mimetic"
    """Mimetic."""
    alpha_qk: float = Field(0.7, ge=0)
    """Weight of the noise in the wanted product of queries and keys; the paper's value is the default."""
    beta_qk: float = Field(0.7, ge=0)
    """Weight of the identity in the wanted product of queries and keys; the paper's value is the default."""
    alpha_vo: float = Field(0.4, ge=0)
    """Weight of the noise in the wanted product of values and projection; the paper's value is the default."""
    beta_vo: float = Field(0.4, ge=0)
    """Weight of the negative identity in the wanted product of values and projection; the paper's value is the
    default."""


class WeightSelectionConfig(MethodConfig):
    """Weight selection: a smaller model takes first layers and evenly spaced units of a larger one."""

    name: Literal["weight_selection"] = "weight_selection"
    """Weight selection."""
    rows: Literal["grouped", "whole"] = "grouped"
    """How units are chosen: `grouped` takes the same ones wherever they occur, by head in attention, so that the copy
    is a sub-network; `whole` chooses along every axis by itself, as the authors do."""


class KeptBlocksConfig(MethodConfig):
    """Whole blocks of an ancestor are kept; the others start from scratch."""

    keep: int = Field(3, ge=1, le=1_000)
    """Number of the ancestor's blocks that a target keeps; a target with fewer blocks keeps all its own."""


class HeurLgConfig(KeptBlocksConfig):
    """Heur-LG: the ancestor's last blocks are kept, behind random ones."""

    name: Literal["heur_lg"] = "heur_lg"
    """The heuristic learngene."""


class AutoLgConfig(KeptBlocksConfig):
    """Auto-LG: the ancestor's first blocks are kept, in front of random ones."""

    name: Literal["auto_lg"] = "auto_lg"
    """The automatic learngene."""
    keep: int = Field(6, ge=1, le=1_000)
    """Number of the ancestor's blocks that a target keeps; a target with fewer blocks keeps all its own."""


class SvdConfig(MethodConfig):
    """Per-layer SVD: each layer keeps its own top singular components."""

    name: Literal["svd"] = "svd"
    """Per-layer singular value decomposition."""
    rank: int | None = Field(None, ge=1, le=2**16)
    """Components of every matrix of a layer. Default: as many as `budget` has room for."""
    budget: int | None = Field(None, ge=1)
    """Numbers that the components of all layers may take together. Default: those of one pair of shared factors of rank
    D, FINE's own, so that both are compared at equal storage."""

    @model_validator(mode="after")
    def _one_of_them(self) -> SvdConfig:
        if self.rank and self.budget:
            raise ValueError(f"rank {self.rank} and budget {self.budget} both say how many components; give one")
        return self


class SvdiffConfig(MethodConfig):
    """SVDiff: shifts of singular values train, everything else is frozen."""

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
    """Depth of the model that stage 1 trains, whatever the ancestor's; the paper uses 12. None takes the depth of
    `arch`."""


class SwsConfig(MethodConfig):
    """SWS: the layers of a stage share one block; a single stage is Share Init."""

    name: Literal["sws"] = "sws"
    """Stage-wise sharing."""
    stages: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((3, 3, 4, 3, 3), min_length=1)
    """Layers in each stage of the model that stage 1 trains, whose depth is their sum. One entry is Share Init."""


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


class FrontConfig(MethodConfig):
    """FRONT: low frequencies of a trained model's weights, resampled to any depth and width."""

    name: Literal["front"] = "front"
    """FRONT, arXiv 2603.07523."""
    keep: float = Field(1.0, gt=0, le=1)
    """Share of the frequencies along every axis that are kept. At 1, a target of the parent's own shape is its copy;
    less is a smaller learngene, whose targets need more training."""


class SweetConfig(MethodConfig):
    """SWEET: one Tucker core shared by all matrices, scalers over depth and over width."""

    name: Literal["sweet"] = "sweet"
    """SWEET, arXiv 2601.19694."""
    components: int = Field(24, ge=1, le=2**16)
    """Number of components of the shared core. The default stores about as many numbers as FINE's factors of rank D;
    18 L components could make any L layers exactly."""
    side: int | None = Field(None, ge=1, le=2**16)
    """Side of a component. Default: the width of stage 1. Smaller values give a smaller learngene, whose weights have
    at most this rank."""
    scaling: float = Field(0.1, ge=0, lt=1)
    """Random scaling of the core along its dimensions of width while stage 1 trains: each is multiplied by a number
    between 1 - scaling and 1 + scaling, drawn at every step. It prepares the core for other widths; 0 switches it
    off."""
    scalers: Literal["linear", "random", "identical", "segment", "aligned"] = "segment"
    """Start of a target's scalers over depth: `linear`, `segment` and `aligned` carry the learngene's over, `random`
    and `identical` are controls (docs/fanout.md)."""
