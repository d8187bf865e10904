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
"""Values of `classes` that mean every class: `all` is per_class images of each, `balanced` cycles through them."""
DEFAULT_CLASSES = 10
"""Number of classes when none are given. A model with more classes has this many chosen by the seed."""


class SamplingSettings(Config):
    """Settings that all commands which sample images share."""

    vae: PathKey | None = None
    """Folder or hub name of the autoencoder that decodes latents. Default: latents are shown as they are."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the decoder; bf16 is faster on a GPU and changes pixels by a level or two."""
    seed: Seed = 0
    """Random seed of the noise. Image i of a seed is the same for every batch size and number of processes."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights to use: the exponential moving average (`ema`), or those of the last step (`raw`)."""
    learngene: PathKey | None = None
    """Current location of the learngene that a target was made from, if it has moved."""
    hints: HintsConfig = HintsConfig()
    """Facts about another project's model file that the file does not state."""
    sampler: SamplerOverrides = SamplerOverrides()
    """Solver, steps and guidance."""
    diffusion: DiffusionConfig | None = None
    """Diffusion process that the model was trained for. Default: from its manifest, which is nearly always right."""
    engine: EngineConfig = EngineConfig()
    """Device and threads; the other settings of a training loop are not used here."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job, if it is submitted to a cluster."""


class SampleConfig(SamplingSettings):
    """Sample images from a model, or the same images from several models (`--compare`). Guidance, clip and the
    diffusion process default to those in the model's manifest."""

    model: PathKey | None = None
    """A model, a target, a learngene, a run directory or a family of targets; also a DiT `.pt` file, a diffusers
    folder, or a name on the hub. A family gives one grid with one row per target."""
    compare: tuple[PathKey, ...] = ()
    """Further models. The result is one grid with one row per model, of the same seeds and classes, instead of the
    files. Entries of a family's folder that are no models (`--compare FAMILY/*`) are ignored."""
    run_dir: PathKey = "runs/samples"
    """Folder of the results. Running the same command again resumes an interrupted one."""
    classes: tuple[int | str, ...] = ()
    """Classes by number or name, with per_class images of each; `all` for every class, `balanced` to cycle through all
    classes. Default: all classes if there are at most 10, else 10 chosen by the seed."""
    per_class: int = Field(8, ge=1, le=10_000_000)
    """Number of images of each class, if `count` is not given."""
    count: int | None = Field(None, ge=1, le=100_000_000)
    """Total number of images, cycling through the classes. Default: per_class images of each class."""
    formats: tuple[Literal["npy", "grid", "png", "npz"], ...] = Field(("npy", "grid"), min_length=1)
    """Files to write: `npy` (latents and labels), `grid` (samples.png), `png` (one file per image), `npz` (all images
    in ADM's format, uint8)."""
