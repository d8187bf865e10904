"""Settings of the commands that draw images of models: what they share, and what is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.artifacts.locate import HintsConfig
from fine_dist.artifacts.model_facts import FeaturesConfig, SamplerOverrides
from fine_dist.core.config import Config
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.settings import EngineConfig


class SamplingSettings(Config):
    """What every command says that draws images of models."""

    vae: str | None = None
    """Folder or hub name of the `AutoencoderKL` that decodes latents."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the decoder."""
    seed: int = Field(0, ge=0)
    """Seeds the noise: image i of a seed is the same whatever the batch or the number of processes."""
    weights: Literal["ema", "raw"] = "ema"
    """The averages of what was trained, or the weights themselves."""
    learngene: str | None = None
    """Where the parent of an initialised target lies now, when it has moved."""
    hints: HintsConfig = HintsConfig()
    """What another project's file does not say of itself."""
    sampler: SamplerOverrides = SamplerOverrides()
    """Scheduler, steps, guidance."""
    diffusion: DiffusionConfig | None = None
    """The process that a model was trained for; none: as its manifest says."""
    engine: EngineConfig = EngineConfig()
    """Device and threads."""
    launch: LaunchConfig = LaunchConfig()
    """What the job needs, where it is submitted."""


class EvaluateConfig(SamplingSettings):
    """Measure models, or files of images: the held-out noise-prediction loss, FID, sFID, IS, precision, recall,
    FDD, KID and Fréchet distances on other networks."""

    models: tuple[str, ...] = ()
    """Models of any source or the runs that made them; also images: an .npz, a .tar or a folder of pictures."""
    metrics: tuple[str, ...] = ()
    """held_out fid sfid is precision recall kid fdd fd-efflite fd-classifier; none: what data and features allow."""
    run_dir: str = "runs/evaluate"
    """Where evaluate.json is written; numbers of another protocol get a file of their own beside it."""
    samples: int = Field(500, ge=2)
    """Images drawn of each model, classes in turn."""
    reference: str | None = None
    """Real images (.npz, .tar, folder) or their statistics (ADM's .npz); none: those of data.shards."""
    features: FeaturesConfig = FeaturesConfig()
    """Weights of the feature networks; a folder alone is a classifier's."""
    data: DataConfig = DataConfig()
    """`held_out` for the loss; `shards` are the real images when there is no reference."""
