"""What a model's manifest says of how it is to be sampled and measured, and what a user's settings make of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig

_MODELS_OWN = ("guidance", "guidance_channels", "clip")
"""Settings of a sampler that belong to the model."""


class SamplerOverrides(Config):
    """Sampling. What is not said of guidance and clip is as the model's manifest has it, or else none."""

    scheduler: Literal["ddpm", "ddim", "dpm"] = "ddim"
    """DDPM (ancestral), DDIM, or DPM-Solver++ (multistep)."""
    steps: int = Field(50, ge=1)
    """Number of denoising steps."""
    guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance scale; 1 is no guidance; none: the model's."""
    guidance_channels: int | Literal["all"] | None = None
    """Latent channels that guidance moves, from the first, or `all`; none: the model's. The original DiT: 3."""
    clip: float | Literal["off"] | None = None
    """Predicted clean latents are clamped to [-clip, clip], or `off`; none: the model's."""
    batch: int = Field(64, ge=1)
    """Images drawn together."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """A `SamplerConfig` has nothing open."""
        if isinstance(value, SamplerConfig):
            said = value.model_dump()
            return {**said, "clip": said["clip"] or "off", "guidance_channels": said["guidance_channels"] or "all"}
        return value


@dataclass(frozen=True)
class ModelFacts:
    """Of a model. diffusion: none where nothing says. sampler: settings by name, those that its manifest has.

    codec: `identity` for images themselves, a name for an autoencoder's latents, none where nothing says.
    """

    diffusion: DiffusionConfig | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    codec: str | None = None
    scaling_factor: float | None = None
    class_names: tuple[str, ...] = ()

    def pictures(self, channels: int) -> bool:
        """Whether the model's latents of so many channels are pictures themselves."""
        return channels in (1, 3) and self.codec in (None, "identity")


def model_facts_of(about: dict[str, Any]) -> ModelFacts:
    """From what `load_model` says, or a manifest's extra."""
    codec, diffusion = about.get("codec") or {}, about.get("diffusion")
    name = codec.get("name")
    return ModelFacts(
        diffusion=DiffusionConfig.model_validate(diffusion) if diffusion else None,
        sampler={key: value for key, value in (about.get("sampler") or {}).items() if key in _MODELS_OWN},
        codec=name,
        scaling_factor=codec.get("scaling_factor") if name != "identity" else None,
        class_names=tuple(about.get("class_names") or ()),
    )


def resolve_sampling(
    wish: SamplerOverrides, diffusion: DiffusionConfig | None, facts: ModelFacts, where: str
) -> tuple[SamplerConfig, DiffusionConfig, list[str]]:
    """The settings that a model is sampled with, and a line for each that contradicts its manifest.

    wish, diffusion: the user's; none is the model's. where: the model's name, for the lines.
    """
    said = wish.model_dump()
    own = SamplerConfig().model_dump() | facts.sampler
    notes, found = [], {}
    for key, value in said.items():
        if value is None:
            found[key] = own[key]
            continue
        found[key] = None if value in ("off", "all") else value
        if key in facts.sampler and found[key] != facts.sampler[key]:
            notes.append(f"sampler.{key} {_word(value)} is used; {where} was trained with {_word(facts.sampler[key])}")
    if diffusion is not None and facts.diffusion is not None:
        for key, value in diffusion.model_dump().items():
            theirs = getattr(facts.diffusion, key)
            if value != theirs:
                notes.append(f"diffusion.{key} {_word(value)} is used; {where} was trained with {_word(theirs)}")
    return SamplerConfig(**found), diffusion or facts.diffusion or DiffusionConfig(), notes


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
