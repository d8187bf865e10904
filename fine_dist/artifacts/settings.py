"""Settings of commands that read models: hints about other projects' files, and a sampler's settings. Without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config
from fine_dist.diffusion.settings import MAX_TIMESTEPS, Precision, SamplerConfig, SchedulerName, check_interval
from fine_dist.model.arch import SidesKey


class HintsConfig(Config):
    """What another project's file may not say of itself. Default of each: as the file says, or as is usual."""

    num_heads: int | None = Field(None, ge=1, le=4096)
    """Attention heads of a state dict, which does not say them. Default: by width for DiT's sizes S, B, L and XL."""
    num_classes: int | None = Field(None, ge=1, le=10_000_000)
    """Classes without the null label. Default: one less than the label table has rows."""
    input_size: SidesKey | None = None
    """Side of a latent, or its height and width. Default: from the position table or the config, where there is one."""
    frequency_shift: int | None = Field(None, ge=0, le=1)
    """Time frequencies: 0 as in DiT, 1 as in models trained in diffusers. Default: by where the folder comes from."""
    process: Literal["ddpm", "sit", "repa"] | None = None
    """What a state dict was trained for: ddpm (noise prediction), sit (flow, time 0 is noise) or repa (flow, time 0 is
    data). Default: by the file's name and saved arguments, else ddpm."""
    licence: str | None = None
    """Licence of the weights, as an SPDX name such as cc-by-nc-4.0. Default: as the file says, else unknown."""


NO_HINTS = HintsConfig()


class SamplerOverrides(Config):
    """Sampling of a saved model. Settings that are not given are as the model's manifest has them."""

    scheduler: SchedulerName = "auto"
    """Solver. For ddpm: `ddpm` (ancestral), `ddim`, `dpm` (DPM-Solver++). For flow: `euler`, `heun`, `sde`. `auto`:
    ddim for ddpm, euler for flow."""
    steps: int = Field(50, ge=1, le=MAX_TIMESTEPS)
    """Number of denoising steps; more are slower and closer to the exact solution."""
    guidance: float | None = Field(None, ge=0, le=1e4)
    """Scale of classifier-free guidance; 1 is no guidance. Default: the model's own, else 1."""
    guidance_channels: int | Literal["all"] | None = None
    """Number of latent channels that guidance moves, from the first, or `all`. Default: the model's own, else all. The
    original DiT uses 3."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels, from 0 (clean) to 1 (noise), between which guidance acts (arXiv 2404.07724). Default: all."""
    clip: float | Literal["off"] | None = None
    """Predicted clean latents are clamped to [-clip, clip], or `off`. Default: the model's own, else off."""
    precision: Precision = "fp32"
    """Arithmetic of the model: fp32, tf32 (matrix products on a GPU) or bf16; part of a score's protocol. bf16 is
    several times faster on a GPU."""
    compile: bool = False
    """Compile the model's blocks with torch.compile, which pays for itself from a few hundred images on a GPU."""
    batch: int = Field(64, ge=1, le=65_536)
    """Number of images sampled together; it changes speed and memory only."""

    @model_validator(mode="before")
    @classmethod
    def _from_sampler_config(cls, value: Any) -> Any:
        """A `SamplerConfig` leaves nothing open: its None means off or all."""
        if isinstance(value, SamplerConfig):
            given = value.model_dump()
            return {**given, "clip": given["clip"] or "off", "guidance_channels": given["guidance_channels"] or "all"}
        return value

    @model_validator(mode="after")
    def _in_range(self) -> SamplerOverrides:
        check_interval(self.guidance_interval)
        if isinstance(self.clip, (int, float)) and self.clip <= 0:
            raise ValueError(f"clip {self.clip:g}: give a number above 0, or off")
        if isinstance(self.guidance_channels, int) and self.guidance_channels < 1:
            raise ValueError(f"guidance_channels {self.guidance_channels}: give 1 or more, or all")
        return self
