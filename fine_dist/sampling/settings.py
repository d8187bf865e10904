"""Settings that all commands share which draw images of models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.artifacts.locate import HintsConfig
from fine_dist.artifacts.model_facts import SamplerOverrides
from fine_dist.core.config import Config
from fine_dist.core.settings import LaunchConfig
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
