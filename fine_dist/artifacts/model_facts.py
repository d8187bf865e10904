"""The facts in a model's manifest that sampling and evaluation need, and how a user's settings override them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from fine_dist.artifacts.settings import SamplerOverrides
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.data.manifest import Channels
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig

_MODEL_SETTINGS = ("guidance", "guidance_channels", "clip")
"""Settings of a sampler that a manifest records, because they depend on the model."""
_FORWARD = {
    "ddpm": ("process", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr"),
    "flow": ("process", "direction", "time_scale"),
}
"""Settings of a process that determine how latents are noised and which time the model receives."""
_CONVERTIBLE = ("direction", "time_scale")
"""Conventions of a flow between which a teacher's inputs and outputs are converted exactly."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model, from its manifest. None or empty: the manifest does not state them.

    Args:
        diffusion: The process it was trained for.
        sampler: Sampler settings that its manifest records, by name.
        codec: `identity` if the latents are pixels, else the name of the autoencoder.
        scaling_factor: Factor by which the training latents were multiplied, for all channels or for each.
        shift_factor: Value that was subtracted from the latents before, for all channels or for each.
        class_names: Class names by label.
    """

    diffusion: DiffusionConfig | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    codec: str | None = None
    scaling_factor: Channels | None = None
    shift_factor: Channels | None = None
    class_names: tuple[str, ...] = ()

    def pictures(self, channels: int) -> bool:
        """Whether the model's latents, which have `channels` channels, are pixels."""
        return channels in (1, 3) and self.codec in (None, "identity")


def model_facts_of(metadata: dict[str, Any]) -> ModelFacts:
    """Return the facts in a model's metadata, which are what `load_model` returns or `extra` of a manifest.

    Raises:
        ArtifactError: A value is of a wrong type or out of range.
    """
    codec = metadata.get("codec") or {}
    sampler = metadata.get("sampler") or {}
    names = metadata.get("class_names") or ()
    if not (isinstance(codec, dict) and isinstance(sampler, dict) and isinstance(names, (list, tuple))):
        raise ArtifactError(f"{metadata.get('folder', 'manifest')}: codec, sampler or class_names is of a wrong type")
    name, sampler_settings = codec.get("name"), {key: value for key, value in sampler.items() if key in _MODEL_SETTINGS}
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
    """Convert a JSON value: one number for all channels, a list with one for each, or null."""
    if isinstance(value, (list, tuple)):
        return tuple(map(float, value))
    return None if value is None else float(value)


def diffusion_of(metadata: dict[str, Any]) -> DiffusionConfig | None:
    """Return the process in a model's metadata, or None. Raises `ArtifactError` if its settings are not valid."""
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
    """Check that a parent's weights can be used with the process of a run.

    Args:
        parent: The process that the parent was trained for; None (unknown) passes.
        wanted: The process of the run.
        where: The parent's name, for the message.
        teacher: The parent is only a teacher, whose outputs are converted exactly: another prediction (noise or v) and
            another convention of a flow are allowed.

    Raises:
        ConfigError: The processes differ; the message names the settings.
    """
    if parent is None:
        return
    keys = [key for key in _FORWARD[wanted.process] if not (teacher and key in _CONVERTIBLE)]
    parent_values, wanted_values = parent.model_dump(), wanted.model_dump()
    if not teacher:
        keys.append("prediction")
        parent_values["prediction"], wanted_values["prediction"] = parent.predicts, wanted.predicts
    differs = [key for key in keys if parent_values[key] != wanted_values[key]]
    if differs:
        differences = ", ".join(
            f"{key} {_text(parent_values[key])} (the run: {_text(wanted_values[key])})" for key in differs
        )
        flags = " ".join(f"--diffusion.{key.replace('_', '-')} {_text(parent_values[key])}" for key in differs)
        raise ConfigError(
            f"diffusion: {where} was trained with {differences}, so its weights mean something else here; "
            f"set {flags}, or take a parent of this process"
        )


def resolve_sampling(
    overrides: SamplerOverrides, diffusion: DiffusionConfig | None, facts: ModelFacts, where: str
) -> tuple[SamplerConfig, DiffusionConfig, list[str]]:
    """Combine a user's settings with those of a model's manifest.

    Args:
        overrides: The user's sampler settings; a field that is None takes the model's value.
        diffusion: The user's process; None takes the model's.
        facts: The facts of the model's manifest.
        where: The model's name, for the notes.

    Returns:
        The sampler settings, the process, and a note for each user setting that differs from the manifest.
    """
    defaults = SamplerConfig().model_dump() | facts.sampler
    notes, settings = [], {}
    for key, value in overrides.model_dump().items():
        if value is None:
            settings[key] = defaults[key]
            continue
        settings[key] = None if value in ("off", "all") else value  # in a SamplerConfig None means off or all
        if key in facts.sampler and settings[key] != facts.sampler[key]:
            notes.append(f"sampler.{key} {_text(value)} is used; {where} was trained with {_text(facts.sampler[key])}")
    if diffusion is not None and facts.diffusion is not None:
        for key, value in diffusion.model_dump().items():
            theirs = getattr(facts.diffusion, key)
            if value != theirs:
                notes.append(f"diffusion.{key} {_text(value)} is used; {where} was trained with {_text(theirs)}")
    return SamplerConfig(**settings), diffusion or facts.diffusion or DiffusionConfig(), notes


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _line(error: Exception) -> str:
    """Return the first problem of a validation, or an error's first line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {str(first['input'])[:80]})"
    return str(error).partition("\n")[0]
