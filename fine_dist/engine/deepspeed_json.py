"""DeepSpeed's config, generated from ours. A JSON file of the user may add keys, but overrides none of ours."""

from __future__ import annotations

from typing import Any

from fine_dist.core.errors import ConfigError
from fine_dist.core.json_files import read_json
from fine_dist.engine.settings import DeepSpeedConfig, EngineConfig, OptimConfig

BUCKET = 50_000_000
"""Number of values in each of DeepSpeed's communication buffers, by default."""
LIVE = 100_000_000
"""Number of values that ZeRO-3 keeps gathered at once, by default."""

DEFAULTS: dict[int, dict[str, int]] = {
    # Buffers of DeepSpeed's own default size (500 million values) are larger than the models here.
    1: {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    2: {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    3: {
        "reduce_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": LIVE,
    },
}
"""Keys of `zero_optimization` by stage that are used unless the user's file sets them."""
_OURS = ("optimizer", "scheduler", "universal_checkpoint", "checkpoint", "tensorboard", "csv_monitor", "wandb")
"""Sections of DeepSpeed's config that a file must not have, because this project does the work of all of them."""


def deepspeed_json(
    optim: OptimConfig, engine: EngineConfig, world_size: int, micro: int, accumulation: int
) -> dict[str, Any]:
    """Return DeepSpeed's config for our settings, with the keys of the file `engine.deepspeed.extra`.

    Args:
        optim: Settings of the optimizer.
        engine: Settings of the loop.
        world_size: Number of ranks.
        micro: Number of samples in a rank's micro-batch.
        accumulation: Number of micro-batches per step.

    Raises:
        ConfigError: Offload needs another stage, or keys of the file contradict our settings or are in `_OURS`. The
            message names all such keys. A value "auto" in the file never contradicts.
    """
    settings = engine.deepspeed
    if settings.offload_params and settings.stage != 3:
        raise ConfigError(f"engine.deepspeed.offload_params needs stage 3 (stage is {settings.stage})")
    if settings.offload_optimizer and settings.stage == 0:
        raise ConfigError("engine.deepspeed.offload_optimizer needs stage 1, 2 or 3 (stage is 0)")
    zero: dict[str, Any] = {"stage": settings.stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_params:
        zero["offload_param"] = {"device": "cpu"}
    generated: dict[str, Any] = {
        "train_batch_size": micro * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": (optim.clip_norm or 0.0) if settings.stage else 0.0,  # stage 0: `_ClippingAdamW`
        "zero_optimization": zero,
        # The optimizer is torch's fused AdamW; DeepSpeed would compile its own.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": False},
        # bf16 means autocast here, so that weights and moments stay fp32. The list of modules is empty,
        # because DeepSpeed would reduce the gradients of those modules in bf16.
        "bf16": {"enabled": False},
        "communication_data_type": "bf16" if engine.reduce_dtype == "bf16" else "fp32",
        "torch_autocast": {
            "enabled": engine.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    merged = generated if settings.extra is None else _with_extra(generated, settings)
    for key, value in DEFAULTS.get(settings.stage, {}).items():
        merged["zero_optimization"].setdefault(key, value)
    return merged


def _with_extra(generated: dict[str, Any], settings: DeepSpeedConfig) -> dict[str, Any]:
    """Return the generated config with the keys of the user's file."""
    assert settings.extra is not None
    remedy = "engine.deepspeed.extra needs a JSON file of DeepSpeed's keys"
    try:
        extra = read_json(settings.extra, ConfigError, remedy)
    except FileNotFoundError as error:
        raise ConfigError(f"engine.deepspeed.extra: {settings.extra}: {error.strerror}") from None
    if not isinstance(extra, dict):
        raise ConfigError(f"engine.deepspeed.extra: {settings.extra}: an object of DeepSpeed's keys is needed")
    conflicts = [
        f"{key}: {key} is set by our config (optim, engine), not by DeepSpeed's; remove it"
        for key in _OURS
        if key in extra
    ]
    zero_extra = extra.get("zero_optimization")
    zero_extra = zero_extra if isinstance(zero_extra, dict) else {}
    conflicts += [
        f"zero_optimization.{key}: in the file, and engine.deepspeed.{ours_key} is false"
        for key, ours_key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_params"))
        if key in zero_extra and key not in generated["zero_optimization"]
    ]
    merged = _merge(generated, extra, conflicts)
    if conflicts:
        raise ConfigError(
            f"engine.deepspeed.extra: {settings.extra} contradicts this config:\n  "
            + "\n  ".join(conflicts)
            + '\nremove these keys, write "auto" for them, or change the config'
        )
    return merged


def _merge(generated: dict[str, Any], extra: dict[str, Any], conflicts: list[str], path: str = "") -> dict[str, Any]:
    """Return the union of both, key by key, and append a line to `conflicts` for each key with two values."""
    merged = dict(generated)
    for key, value in extra.items():
        dotted_key = path + key
        if value == "auto":
            continue  # the generated value, or the default in `DEFAULTS`
        if key not in generated:
            merged[key] = value
        elif isinstance(generated[key], dict) and isinstance(value, dict):
            merged[key] = _merge(generated[key], value, conflicts, dotted_key + ".")
        elif value != generated[key]:
            conflicts.append(f"{dotted_key}: {value!r} in the file, {generated[key]!r} by our config")
    return merged
