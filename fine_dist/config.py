"""Typed, frozen configs and their YAML: the machinery, and the settings of the rooms.

A command's config is a tree of these; `fine_dist.cli` lays dotted flags over it. Neither torch nor any other heavy
library is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fine_dist.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of all configs: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


# --- the rooms' settings -------------------------------------------------------------------------------------------


class DataConfig(Config):
    """Where latents are read from, and how (see `fine_dist.data.stream`)."""

    shards: str | None = None
    """Folder, URL or brace pattern of webdataset latent shards with their manifest.json."""
    held_out: str | None = None
    """Shards that are never trained on; the held-out loss is measured on them."""
    streams: int = Field(64, ge=1)
    """Canonical streams C: the order of samples depends on it, never on the number of processes."""
    window: int = Field(1024, ge=1)
    """Shuffle window of one stream, in samples (rounded up to whole shards)."""
    workers: int = Field(0, ge=0)
    """Reader threads of each training process, which read ahead; 0 reads when a batch is asked for."""
    max_bad_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of damaged samples that is skipped before it becomes an error."""
    verify: Literal["size", "sha256", "none"] = "size"
    """What is checked when a shard is opened: its size, its sha256 as well, or nothing."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept; none by default."""
    cache_bytes: int = Field(50 * 2**30, ge=0)
    """Size cap of the cache, in bytes."""
    retries: int = Field(5, ge=0)
    """Attempts after the first to open or read a remote shard."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds without a byte after which a remote read is tried again."""


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


class OptimConfig(Config):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to zero at the last step along a half cosine."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; none: never."""


class DeepSpeedConfig(Config):
    """DeepSpeed's ZeRO; its JSON is generated from these fields."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over processes: nothing, optimiser state, also gradients, also parameters."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in host memory."""
    offload_params: bool = False
    """Keep parameters in host memory (stage 3)."""
    extra: str | None = None
    """A DeepSpeed JSON file whose keys are added; one that contradicts this config is an error."""


class EngineConfig(Config):
    """How the loop runs: backend, precision, memory, checkpoints, logs. Nothing here changes the mathematics."""

    backend: Literal["plain", "deepspeed"] = "plain"
    """`plain`: every process holds everything, gradients are summed. `deepspeed`: ZeRO shards what it holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` is autocast; weights, sigma, EMA and optimiser state stay fp32."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples a process takes through the model at once; none: global batch / world size."""
    activation_checkpointing: Literal["none", "blocks", "every_other"] = "none"
    """Recompute blocks in the backward pass instead of keeping their activations."""
    compile: bool = False
    """torch.compile each block; falls back with a warning."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of the deepspeed backend."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """The last K are kept."""
    log_every: int = Field(50, ge=1)
    """Steps between rows in TensorBoard and metrics.jsonl."""
    eval_every: int = Field(1000, ge=1)
    """Steps between measurements of the held-out loss."""
    picture_every: int = Field(5000, ge=1)
    """Steps between pictures in TensorBoard (samples of the EMA, sigma by layer)."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """What a NaN or Inf loss does: stop with the last good checkpoint kept, or skip that step."""
    max_bad_steps: int = Field(10, ge=1)
    """Steps that `skip` may skip before it stops."""
    time_limit_min: float | None = Field(None, gt=0)
    """Save and exit with code 75 after so many minutes; none: never."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a process; none: torch's choice."""
    peak_tflops: float | None = Field(None, gt=0)
    """Stated peak of one accelerator for MFU; none: a table of known ones, or measured on CPU."""


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


class LaunchConfig(Config):
    """What a job needs and how the launchers run it. Nothing here changes results."""

    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    processes: int = Field(1, ge=1)
    """Processes a node; one an accelerator is usual."""
    gpus: float = Field(0, ge=0)
    """Accelerators a process; a fraction lets tasks of a fan-out share one (Ray, local)."""
    cpus: int = Field(1, ge=1)
    """CPU cores a process."""
    memory_gb: float | None = Field(None, gt=0)
    """Host memory a node, in GiB; none: the cluster's default."""
    minutes: int | None = Field(None, ge=1)
    """Time limit of a job (of one task, in a fan-out); none: the cluster's default."""
    max_parallel: int | None = Field(None, ge=1)
    """Tasks of a fan-out that run at once; none: as many as fit."""
    retries: int = Field(1, ge=0)
    """Further attempts for a task or a Ray worker group that was lost or failed."""
    max_restarts: int = Field(20, ge=0)
    """Times that SLURM may start a job again after preemption, a time limit or a lost node."""
    wait: bool = False
    """Stay until a submitted job has ended, and exit with its code (SLURM; Ray Jobs)."""
    snapshot: bool = True
    """Submitted jobs run a copy of the code as it is now, whatever changes before they start."""
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    """What a submission does when the preflight (`fine_dist.plan`) finds that it cannot work."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Memory of one accelerator where the job will run, in GiB, for the preflight; none: this machine's, when local."""
    partition: str | None = None
    """SLURM partition; none: the cluster's default."""
    account: str | None = None
    """SLURM account; none: the user's default."""
    address: str | None = None
    """Ray: `auto`, HOST:PORT or ray://HOST:10001 to connect, http://HOST:8265 for a Ray job; none: RAY_ADDRESS."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every process."""
    slurm: dict[str, str] = Field(default_factory=dict)
    """Further sbatch options by their long names: `constraint`, `qos`, `exclude`."""
    ray: dict[str, str] = Field(default_factory=dict)
    """Further Ray resources a process needs: `{"highmem": "1"}`."""


# --- YAML ----------------------------------------------------------------------------------------------------------


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping read from a YAML file by the safe loader. `ConfigError` when it is not one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"config file {path}: a mapping of keys to values is needed, not {type(values).__name__}")
    return values or {}


class _Loader(yaml.SafeLoader):
    """The safe loader, reading `1e-4` as the number it is (YAML 1.1 wants `1.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def validate(kind: type[C], values: dict[str, Any], where: str = "config") -> C:
    """`values` as a `kind`; a `ConfigError` names every wrong key by its full path, with value and legal values."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, item) for item in error.errors()]
        raise ConfigError(f"{where}: " + "\n  ".join(lines)) from None


def dump_yaml(config: Config) -> str:
    """The resolved config; `validate(type(config), yaml.safe_load(text)) == config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def load(kind: type[C], path: str | Path) -> C:
    """A config file as a `kind`."""
    return validate(kind, load_yaml(path), str(path))


def _explain(kind: type[Config], item: Any) -> str:
    loc = [str(part) for part in item["loc"]]
    owner = _model_at(kind, loc[:-1])
    path = ".".join(part for part in loc if part not in _tags(kind, loc))
    if item["type"] == "extra_forbidden":
        legal = owner.model_fields if owner else ()
        return f"{path}: unknown key (value {item['input']!r}); {nearest(loc[-1], legal)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower() + message[1:]} (got {item['input']!r})" if path else message


def _tags(kind: type[Config], loc: list[str]) -> set[str]:
    """Names of union variants, which pydantic puts into a path and no user wrote."""
    found = set()
    for cut in range(1, len(loc)):
        owner = _model_at(kind, loc[:cut])
        parent = _model_at(kind, loc[: cut - 1])
        if parent is owner or (owner and parent and loc[cut - 1] not in parent.model_fields):
            found.add(loc[cut - 1])
    return found


def _model_at(kind: type[Config], loc: list[str]) -> type[Config] | None:
    """The config class that a path of keys ends in; union tags are steps that stay in place."""
    here: list[type[Config]] = [kind]
    for part in loc:
        tagged = [m for m in here if "name" in m.model_fields and m.model_fields["name"].default == part]
        if tagged:
            here = tagged
            continue
        fields = [m.model_fields[part].annotation for m in here if part in m.model_fields]
        here = [model for field in fields for model in models_in(field)] or here
    return here[0] if here else None


def models_in(annotation: Any) -> list[type[Config]]:
    """All config classes inside an annotation (optional, union, annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def expand_path(path: str) -> str:
    """`~` and `$VARIABLES` in a path; URLs and `pipe:` are left alone."""
    return path if "://" in path or path.startswith("pipe:") else os.path.expandvars(os.path.expanduser(path))


def union_of(variants: list[type[Config]]) -> Any:
    """The annotation of a field that holds one of several configs, told apart by their `name`."""
    return Annotated[typing.Union[tuple(variants)], Field(discriminator="name")] if len(variants) > 1 else variants[0]
