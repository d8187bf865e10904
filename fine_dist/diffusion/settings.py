"""Settings of the diffusion process and of sampling. This module is read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config

SchedulerName = Literal["auto", "ddpm", "ddim", "dpm", "euler", "heun", "sde"]
Precision = Literal["fp32", "tf32", "bf16"]
MAX_TIMESTEPS = 100_000
"""Longest chain: a hundred times DiT's. Tables of its length are made at every start."""


class DiffusionConfig(Config):
    """The process that a model is trained for: DDPM (DiT, arXiv 2212.09748) or flow matching (SiT, 2401.08740)."""

    process: Literal["ddpm", "flow"] = "ddpm"
    """Forward process: `ddpm` adds noise along a discrete chain, `flow` mixes latent and noise linearly over a
    continuous time. A model trained for one cannot continue in the other."""
    prediction: Literal["noise", "v", "velocity"] | None = None
    """What the model predicts: `noise` or `v` (arXiv 2202.00512) under ddpm, `velocity` under flow. Default: noise
    under ddpm, velocity under flow."""
    num_timesteps: int = Field(1000, ge=1, le=MAX_TIMESTEPS)
    """Length of the DDPM chain. Flow has continuous time and ignores it."""
    beta_start: float = Field(1e-4, gt=0, lt=1)
    """First variance of DDPM's linear schedule. Flow ignores it."""
    beta_end: float = Field(2e-2, gt=0, lt=1)
    """Last variance of DDPM's linear schedule; at least beta_start. Flow ignores it."""
    zero_terminal_snr: bool = False
    """Rescale the DDPM schedule so that its last step is pure noise (arXiv 2305.08891). It needs prediction v, because
    the noise of pure noise says nothing about the image."""
    weighting: Literal["none", "min_snr"] = "none"
    """Weight of a sample's loss under ddpm: `min_snr` bounds it by the signal-to-noise ratio (arXiv 2303.09556)."""
    min_snr_gamma: float = Field(5.0, gt=0, le=1e6)
    """Bound of the signal-to-noise ratio under weighting min_snr; the paper's value is the default."""
    time: Literal["uniform", "logit_normal"] = "uniform"
    """Law of a flow's training times: `uniform` as in SiT, or `logit_normal` as in Stable Diffusion 3 (2403.03206)."""
    time_mean: float = Field(0.0, ge=-10, le=10)
    """Mean of the logit of the noise level under time logit_normal; above 0 there is more noise."""
    time_std: float = Field(1.0, gt=0, le=10)
    """Standard deviation of the logit of the noise level under time logit_normal."""
    time_shift: float = Field(1.0, ge=0.01, le=100)
    """Shift s of a flow's noise levels, s x / (1 + (s - 1) x), in training and sampling. 1 changes nothing; larger
    latents want more noise, that is, a larger shift."""
    direction: Literal["noise_to_data", "data_to_noise"] = "noise_to_data"
    """Where a flow's time 0 lies: `noise_to_data` is SiT's, `data_to_noise` is REPA's and diffusers'. A checkpoint
    keeps its own."""
    time_scale: float = Field(1.0, gt=0, le=1e6)
    """What a flow's time of 0 to 1 is multiplied by before the model sees it: 1 in SiT, 1000 in diffusers."""
    label_drop: float = Field(0.1, ge=0, le=1)
    """Probability that a training label is replaced by the null label, which classifier-free guidance needs."""

    @model_validator(mode="after")
    def _fits_together(self) -> DiffusionConfig:
        legal = ("velocity",) if self.process == "flow" else ("noise", "v")
        if self.prediction not in (None, *legal):
            raise ValueError(
                f"prediction {self.prediction} does not fit process {self.process}; legal: {', '.join(legal)}"
            )
        if self.zero_terminal_snr and (self.process, self.prediction) != ("ddpm", "v"):
            raise ValueError("zero_terminal_snr needs process ddpm and prediction v")
        if self.zero_terminal_snr and self.num_timesteps < 2:
            raise ValueError("zero_terminal_snr needs num_timesteps of 2 or more")
        if self.weighting != "none" and self.process != "ddpm":
            raise ValueError(f"weighting {self.weighting} needs process ddpm; flow is trained with weighting none")
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end {self.beta_end:g} is below beta_start {self.beta_start:g}")
        return self

    @property
    def predicts(self) -> str:
        """The prediction, with the default filled in: `noise`, `v` or `velocity`."""
        return self.prediction or ("velocity" if self.process == "flow" else "noise")


class SamplerConfig(Config):
    """How images are sampled from a model."""

    scheduler: SchedulerName = "auto"
    """Solver. For ddpm: `ddpm` (ancestral), `ddim`, `dpm` (DPM-Solver++). For flow: `euler`, `heun` (two model
    evaluations a step), `sde` (SiT's stochastic sampler). `auto`: ddim for ddpm, euler for flow."""
    steps: int = Field(50, ge=1, le=MAX_TIMESTEPS)
    """Number of denoising steps; more are slower and closer to the exact solution."""
    guidance: float = Field(1.0, ge=0, le=1e4)
    """Scale of classifier-free guidance; 1 is no guidance and halves the cost of a step."""
    guidance_channels: int | None = Field(None, ge=1)
    """Number of latent channels that guidance moves, counted from the first. Default: all. The original DiT uses 3."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels, from 0 (clean) to 1 (noise), between which guidance acts (arXiv 2404.07724). Default: all."""
    clip: float | None = Field(None, gt=0)
    """Predicted clean latents are clamped to [-clip, clip] at every step: 1 for pixels in [-1, 1]. Default: unclamped,
    as latents of an autoencoder need."""
    precision: Precision = "fp32"
    """Arithmetic of the model: fp32, tf32 (matrix products on a GPU) or bf16. It changes images a little and is part
    of a score's protocol."""
    compile: bool = False
    """Compile the model's blocks with torch.compile, which pays for itself from a few hundred images on a GPU. It is
    part of a score's protocol."""
    batch: int = Field(64, ge=1, le=65_536)
    """Number of images sampled together; it changes speed and memory only."""

    @model_validator(mode="after")
    def _interval_in_order(self) -> SamplerConfig:
        check_interval(self.guidance_interval)
        return self


def check_interval(interval: tuple[float, float] | None) -> None:
    """`ValueError` unless a guidance interval lies in 0..1 with its lower end first."""
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError("guidance_interval must be two noise levels in order, within 0 and 1")
