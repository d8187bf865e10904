"""Conversion between diffusers' schedulers and `DiffusionConfig`.

The config of a scheduler contains the process that the model was trained for and defaults of sampling. The process is
read, and is an error if this project does not implement it. The defaults of sampling (solver, Karras noise levels,
thresholding) are ignored, because they are settings of the sampler here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fine_dist.core.errors import ArtifactError
from fine_dist.diffusion.settings import DiffusionConfig

_PREDICTIONS = {"epsilon": "noise", "v_prediction": "v"}
_NAMES = {"noise": "epsilon", "v": "v_prediction"}


def diffusion_from_scheduler(
    scheduler: Mapping[str, Any], marked: DiffusionConfig | None, where: str, notes: list[str]
) -> DiffusionConfig:
    """Return the process that the model of a diffusers folder was trained for.

    Args:
        scheduler: Content of `scheduler_config.json`; empty if there is none.
        marked: The process in the folder's `fine_dist.json`, which includes the convention of a flow; None without it.
        where: The folder's name, for messages.
        notes: A list to which assumptions are appended, as sentences.

    Raises:
        ArtifactError: This project does not implement the process, the config is damaged, or it contradicts `marked`.
    """
    if not scheduler:
        if marked is None:
            notes.append("it has no scheduler: taken for DiT's process, 1000 linear steps of noise prediction")
        return marked or DiffusionConfig()
    try:
        read = _flow(scheduler, where) if _is_flow(scheduler) else _ddpm(scheduler, where)
    except (ValidationError, TypeError, ValueError, OverflowError) as error:
        line = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(f"{where}: its scheduler_config.json is damaged: {line[:200]}") from None
    if marked is None:
        return read
    if _common_settings(read) != _common_settings(marked):
        raise ArtifactError(
            f"{where}: its scheduler and its fine_dist.json name different processes; the scheduler was changed after "
            "the export. Put back the scheduler, or remove fine_dist.json if the scheduler is right"
        )
    return marked


def _common_settings(config: DiffusionConfig) -> tuple[Any, ...]:
    """Return the settings of a process that both files contain."""
    if config.process == "flow":
        return ("flow", round(config.time_shift, 6))
    chain = (config.num_timesteps, round(config.beta_start, 9), round(config.beta_end, 9))
    return ("ddpm", config.predicts, config.zero_terminal_snr, *chain)


def _is_flow(scheduler: Mapping[str, Any]) -> bool:
    return (
        str(scheduler.get("_class_name", "")).startswith("FlowMatch")
        or scheduler.get("prediction_type") == "flow_prediction"
        or scheduler.get("use_flow_sigmas") is True
    )


def _flow(scheduler: Mapping[str, Any], where: str) -> DiffusionConfig:
    """Return the flow of a scheduler's config. diffusers' models receive the noise level times num_train_timesteps."""
    for key in ("use_dynamic_shifting", "invert_sigmas"):
        if scheduler.get(key):
            raise ArtifactError(f"{where}: its scheduler has {key}; legal: a flow of one constant shift, without it")
    shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
    return DiffusionConfig(
        process="flow",
        direction="data_to_noise",
        time_scale=float(scheduler.get("num_train_timesteps", 1000)),
        time_shift=float(shift),
    )


def _ddpm(scheduler: Mapping[str, Any], where: str) -> DiffusionConfig:
    """Return the DDPM process of a scheduler's config; defaults of missing keys are those of diffusers or DiT."""
    schedule, prediction = scheduler.get("beta_schedule", "linear"), scheduler.get("prediction_type", "epsilon")
    betas = scheduler.get("trained_betas") is not None
    if schedule != "linear" or prediction not in _PREDICTIONS or betas:
        raise ArtifactError(
            f"{where}: its scheduler has beta_schedule {schedule!r}, prediction_type {prediction!r}"
            f"{', trained_betas' if betas else ''}; legal: linear, with epsilon or v_prediction"
        )
    return DiffusionConfig.model_validate(
        {
            "prediction": _PREDICTIONS[prediction] if prediction != "epsilon" else None,
            "num_timesteps": scheduler.get("num_train_timesteps", 1000),
            "beta_start": scheduler.get("beta_start", 1e-4),
            "beta_end": scheduler.get("beta_end", 2e-2),
            "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr", False)),
        }
    )


def scheduler_of(diffusion: DiffusionConfig, clip: float | None) -> Any:
    """Return diffusers' scheduler of a process: DDIM, or Euler's method for a flow.

    Args:
        diffusion: The process.
        clip: Limit of DDIM's predicted clean latents; None for no limit.
    """
    import diffusers  # takes seconds, and only exports need it

    if diffusion.process == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=diffusion.time_shift)
    return diffusers.DDIMScheduler(
        num_train_timesteps=diffusion.num_timesteps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        beta_schedule="linear",
        prediction_type=_NAMES[diffusion.predicts],
        rescale_betas_zero_snr=diffusion.zero_terminal_snr,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="trailing",  # the first timestep is T-1, as in this project's sampler
    )
