"""Settings of the commands that sample images from models. This module is read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.artifacts.settings import HintsConfig, SamplerOverrides
from fine_dist.core.config import Config, PathKey, Seed
from fine_dist.core.settings import LaunchConfig
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.settings import EngineConfig

ALL_CLASSES = ("all", "balanced")
"""Words for every class: per_class images of each, or all of them in turn."""
DEFAULT_CLASSES = 10
"""Classes that are drawn when none are named: one row of a grid each, chosen by the seed where there are more."""


class SamplingSettings(Config):
    """What all commands share that sample images from models."""

    vae: PathKey | None = None
    """Folder or hub name of the autoencoder that decodes latents. Default: latents are shown as they are."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the decoder; bf16 is faster on a GPU and changes pixels by a level or two."""
    seed: Seed = 0
    """Seeds the noise: image i of a seed is the same whatever the batch or the number of processes."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights to use: the exponential moving average (`ema`), or those of the last step (`raw`)."""
    learngene: PathKey | None = None
    """Present place of the learngene that a target was made from, when it has moved since."""
    hints: HintsConfig = HintsConfig()
    """Facts about another project's file that it does not state itself."""
    sampler: SamplerOverrides = SamplerOverrides()
    """Solver, steps and guidance."""
    diffusion: DiffusionConfig | None = None
    """The process that a model was trained for. Default: as its manifest says, which is nearly always right."""
    engine: EngineConfig = EngineConfig()
    """Device and threads; the other settings of a training loop are not used here."""
    launch: LaunchConfig = LaunchConfig()
    """What the job needs of a machine, where it is submitted."""


class SampleConfig(SamplingSettings):
    """Draw images from a model, or the same images from several models (`--compare`). Guidance, clip and the process
    are the model's own unless they are given."""

    model: PathKey | None = None
    """A model, a target, a learngene, a run or a family of targets; also DiT's `.pt`, a diffusers folder, or a name on
    the hub. A family gives one grid with a row for each of its targets."""
    compare: tuple[PathKey, ...] = ()
    """Further models: one grid of the same seeds and classes, a row each, instead of the files. Other things in a
    family's folder (`--compare FAMILY/*`) are left out."""
    run_dir: PathKey = "runs/samples"
    """Folder of the results. The same command again continues what is there."""
    classes: tuple[int | str, ...] = ()
    """Classes by number or name, per_class images of each; `all` for every class, `balanced` for every class in turn.
    Default: all where there are at most 10, else 10 that the seed chooses."""
    per_class: int = Field(8, ge=1, le=10_000_000)
    """Number of images of each class, where `count` is not given."""
    count: int | None = Field(None, ge=1, le=100_000_000)
    """Number of images in all, classes in turn. Default: per_class of each class."""
    formats: tuple[Literal["npy", "grid", "png", "npz"], ...] = Field(("npy", "grid"), min_length=1)
    """Files to write: `npy` (latents and labels), `grid` (samples.png), `png` (single pictures), `npz` (ADM's file of
    all pictures, uint8)."""
