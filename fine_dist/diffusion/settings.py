"""Settings of the diffusion process and of sampling. Read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.core.config import Config


class DiffusionConfig(Config):
    """The diffusion process a model is trained for (DiT, arXiv 2212.09748, section 4)."""

    num_timesteps: int = Field(1000, ge=1)
    """Length of the chain."""
    beta_start: float = Field(1e-4, gt=0, lt=1)
    """First variance of the linear schedule."""
    beta_end: float = Field(2e-2, gt=0, lt=1)
    """Last variance of the linear schedule."""
    label_drop: float = Field(0.1, ge=0, le=1)
    """Probability that a label is replaced by the null label (classifier-free guidance)."""


class SamplerConfig(Config):
    """Sampling through diffusers' schedulers."""

    scheduler: Literal["ddpm", "ddim", "dpm"] = "ddim"
    """DDPM (ancestral), DDIM, or DPM-Solver++ (multistep)."""
    steps: int = Field(50, ge=1)
    """Number of denoising steps."""
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance scale; 1 is no guidance."""
    guidance_channels: int | None = Field(None, ge=1)
    """Latent channels that guidance moves, from the first; none: all of them. The original DiT guides three of four."""
    clip: float | None = Field(None, gt=0)
    """Predicted clean latents are clamped to [-clip, clip] at every step: 1 for pixels in [-1, 1]; none for a VAE's."""
    batch: int = Field(64, ge=1)
    """Images at once; changes speed and memory only."""
