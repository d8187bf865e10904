"""Settings of commands that read models: hints about other projects' files, and sampling. Read without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config
from fine_dist.diffusion.settings import MAX_TIMESTEPS, Precision, SamplerConfig, SchedulerName, check_interval
from fine_dist.model.arch import SidesKey


class HintsConfig(Config):
    """Facts that another project's model file may not state. Default of each: read from the file, else the usual
    value."""

    num_heads: int | None = Field(None, ge=1, le=4096)
    """Number of attention heads, which a state dict does not contain. Default: by width, for DiT's sizes S, B, L and
    XL."""
    num_classes: int | None = Field(None, ge=1, le=10_000_000)
    """Number of classes without the null label. Default: the rows of the label table minus one."""
    input_size: SidesKey | None = None
    """Side of a latent, or its height and width. Default: from the position table or the config."""
    frequency_shift: int | None = Field(None, ge=0, le=1)
    """Time frequencies: 0 as in DiT, 1 as in models trained in diffusers. Default: by the origin of the folder."""
    process: Literal["ddpm", "sit", "repa"] | None = None
    """Diffusion process that a state dict was trained for: ddpm (noise prediction), sit (flow, time 0 is noise) or repa
    (flow, time 0 is data). Default: by the file's name and saved arguments, else ddpm."""
    licence: str | None = None
    """License of the weights, as an SPDX name such as cc-by-nc-4.0. Default: the license in the file, else unknown."""


NO_HINTS = HintsConfig()


class SamplerOverrides(Config):
    """Sampling of a saved model. Settings that are not given come from the model's manifest."""

    scheduler: SchedulerName = "auto"
    """Solver. For ddpm: `ddpm` (ancestral), `ddim`, `dpm` (DPM-Solver++). For flow: `euler`, `heun`, `sde`. `auto`:
    ddim for ddpm, euler for flow."""
    steps: int = Field(50, ge=1, le=MAX_TIMESTEPS)
    """Number of denoising steps; more are slower and closer to the exact solution."""
    guidance: float | None = Field(None, ge=0, le=1e4)
    """Scale of classifier-free guidance; 1 is no guidance. Default: the model's own, else 1."""
    guidance_channels: int | Literal["all"] | None = None
    """Number of leading latent channels that guidance changes, or `all`. Default: the model's own, else all. The
    original DiT uses 3."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels, from 0 (clean) to 1 (noise), between which guidance acts (arXiv 2404.07724). Default: all."""
    clip: float | Literal["off"] | None = None
    """Limit of predicted clean latents, which are clamped to [-clip, clip], or `off`. Default: the model's own, else
    off."""
    precision: Precision = "fp32"
    """Arithmetic of the model: fp32, tf32 (matrix products on a GPU) or bf16; part of a score's protocol. bf16 is
    several times faster on a GPU."""
    compile: bool = False
    """Compile the model's blocks with torch.compile; worthwhile for more than a few hundred images on a GPU."""
    batch: int = Field(64, ge=1, le=65_536)
    """Number of images sampled together; it changes speed and memory only."""

    @model_validator(mode="before")
    @classmethod
    def _from_sampler_config(cls, value: Any) -> Any:
        """Read a `SamplerConfig`, in which None means off or all instead of the model's own."""
        if isinstance(value, SamplerConfig):
            settings = value.model_dump()
            return {
                **settings,
                "clip": settings["clip"] or "off",
                "guidance_channels": settings["guidance_channels"] or "all",
            }
        return value

    @model_validator(mode="after")
    def _in_range(self) -> SamplerOverrides:
        check_interval(self.guidance_interval)
        if isinstance(self.clip, (int, float)) and self.clip <= 0:
            raise ValueError(f"clip {self.clip:g}: give a number above 0, or off")
        if isinstance(self.guidance_channels, int) and self.guidance_channels < 1:
            raise ValueError(f"guidance_channels {self.guidance_channels}: give 1 or more, or all")
        return self
