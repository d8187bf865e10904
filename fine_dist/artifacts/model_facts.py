"""What a model's manifest says of how it is sampled and measured, and how a user's settings combine with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fine_dist.artifacts.settings import SamplerOverrides
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.data.manifest import Channels
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig

_MODELS_OWN = ("guidance", "guidance_channels", "clip")
"""Settings of a sampler that belong to the model."""
_FORWARD = {
    "ddpm": ("process", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr"),
    "flow": ("process", "direction", "time_scale"),
}
"""Settings of a process that decide what a noised latent is and which time the model is given for it."""
_SETTLED_BY_LEVEL = ("direction", "time_scale")
"""Settings of a flow that conversions between conventions take care of."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model besides its weights.

    Args:
        diffusion: The process it was trained for; None where nothing says.
        sampler: Settings of a sampler by name, those that its manifest has.
        codec: `identity` for images themselves, a name for an autoencoder's latents, None where nothing says.
        scaling_factor: What the model's latents were multiplied by, for all channels or each; None where nothing says.
        shift_factor: What was subtracted from them before.
        class_names: Names by label; empty where nothing says.
    """

    diffusion: DiffusionConfig | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    codec: str | None = None
    scaling_factor: Channels | None = None
    shift_factor: Channels | None = None
    class_names: tuple[str, ...] = ()

    def pictures(self, channels: int) -> bool:
        """Whether the model's latents, of so many channels, are images themselves."""
        return channels in (1, 3) and self.codec in (None, "identity")


def model_facts_of(metadata: dict[str, Any]) -> ModelFacts:
    """The facts in what `load_model` returns, or in a manifest's extra. `ArtifactError` where they are impossible."""
    codec = metadata.get("codec") or {}
    sampler = metadata.get("sampler") or {}
    names = metadata.get("class_names") or ()
    if not (isinstance(codec, dict) and isinstance(sampler, dict) and isinstance(names, (list, tuple))):
        raise ArtifactError(f"{metadata.get('folder', 'manifest')}: codec, sampler or class_names is of a wrong type")
    name, sampler_settings = codec.get("name"), {key: value for key, value in sampler.items() if key in _MODELS_OWN}
    try:
        SamplerConfig.model_validate(sampler_settings)
        scaling_factor, shift_factor = (
            None if name == "identity" else _channels(codec.get(key)) for key in ("scaling_factor", "shift_factor")
        )
    except (ValidationError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{metadata.get('folder', 'manifest')}: sampler or codec is damaged: {_line(error)}"
        ) from None
    return ModelFacts(
        diffusion=diffusion_of(metadata),
        sampler=sampler_settings,
        codec=name,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        class_names=tuple(map(str, names)),
    )


def _channels(value: Any) -> Channels | None:
    """A number, or one for each channel, as JSON has it."""
    if isinstance(value, (list, tuple)):
        return tuple(map(float, value))
    return None if value is None else float(value)


def diffusion_of(metadata: dict[str, Any]) -> DiffusionConfig | None:
    """The process that a manifest names; None where it names none. `ArtifactError` where it is impossible."""
    diffusion = metadata.get("diffusion")
    if not diffusion:
        return None
    try:
        return DiffusionConfig.model_validate(diffusion)
    except ValidationError as error:
        where = metadata.get("folder", "manifest")
        raise ArtifactError(f"{where}: diffusion is damaged: {_line(error)}; copy the folder again") from None


def check_parent_process(
    parent: DiffusionConfig | None, wanted: DiffusionConfig, where: str, *, teacher: bool = False
) -> None:
    """`ConfigError` unless a parent's weights mean the same under the process that is to be trained.

    Args:
        parent: The process the parent was trained for; None (nothing says) passes.
        wanted: The process of the run.
        where: The parent's name, for the message.
        teacher: It is only imitated. Then another prediction (noise or v) and another convention of a flow are
            converted exactly, and pass.
    """
    if parent is None:
        return
    keys = [key for key in _FORWARD[wanted.process] if not (teacher and key in _SETTLED_BY_LEVEL)]
    parent_values, wanted_values = parent.model_dump(), wanted.model_dump()
    if not teacher:
        keys.append("prediction")
        parent_values["prediction"], wanted_values["prediction"] = parent.predicts, wanted.predicts
    differs = [key for key in keys if parent_values[key] != wanted_values[key]]
    if differs:
        differences = ", ".join(
            f"{key} {_word(parent_values[key])} (the run: {_word(wanted_values[key])})" for key in differs
        )
        flags = " ".join(f"--diffusion.{key.replace('_', '-')} {_word(parent_values[key])}" for key in differs)
        raise ConfigError(
            f"diffusion: {where} was trained with {differences}, so its weights mean something else here; "
            f"set {flags}, or take a parent of this process"
        )


def resolve_sampling(
    overrides: SamplerOverrides, diffusion: DiffusionConfig | None, facts: ModelFacts, where: str
) -> tuple[SamplerConfig, DiffusionConfig, list[str]]:
    """The settings that a model is sampled with, and a line for each that contradicts its manifest.

    Args:
        overrides: The user's sampler settings; None in a field is the model's.
        diffusion: The user's process; None is the model's.
        facts: What the model's manifest says.
        where: The model's name, for the lines.
    """
    defaults = SamplerConfig().model_dump() | facts.sampler
    notes, settings = [], {}
    for key, value in overrides.model_dump().items():
        if value is None:
            settings[key] = defaults[key]
            continue
        settings[key] = None if value in ("off", "all") else value
        if key in facts.sampler and settings[key] != facts.sampler[key]:
            notes.append(f"sampler.{key} {_word(value)} is used; {where} was trained with {_word(facts.sampler[key])}")
    if diffusion is not None and facts.diffusion is not None:
        for key, value in diffusion.model_dump().items():
            theirs = getattr(facts.diffusion, key)
            if value != theirs:
                notes.append(f"diffusion.{key} {_word(value)} is used; {where} was trained with {_word(theirs)}")
    return SamplerConfig(**settings), diffusion or facts.diffusion or DiffusionConfig(), notes


def _word(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _line(error: Exception) -> str:
    """The first problem of a validation, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {str(first['input'])[:80]})"
    return str(error).partition("\n")[0]
