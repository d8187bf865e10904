"""The settings of the rooms, and by re-export all that a config needs (`fine_dist.schema`).

A command's config is a tree of these; `fine_dist.cli` lays dotted flags over it. Neither torch nor any other heavy
library is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from fine_dist.schema import (
    MAX_DEPTH,
    C,
    Config,
    Depth,
    Seed,
    dump_yaml,
    load,
    load_yaml,
    models_in,
    parse_word,
    parse_yaml,
    shown,
    union_of,
    validate,
)

__all__ = [
    "MAX_DEPTH",
    "C",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "Depth",
    "DiffusionConfig",
    "EngineConfig",
    "LaunchConfig",
    "OptimConfig",
    "SamplerConfig",
    "Seed",
    "dump_yaml",
    "expand_path",
    "load",
    "load_yaml",
    "models_in",
    "parse_word",
    "parse_yaml",
    "shown",
    "union_of",
    "validate",
]


class DataConfig(Config):
    """Where latents are read from, and how (see `fine_dist.data.stream`)."""

    shards: str | None = None
    """Folder, URL or brace pattern of webdataset latent shards with their manifest.json."""
    held_out: str | None = None
    """Shards that are never trained on; the held-out loss is measured on them."""
    held_out_samples: int = Field(2048, ge=1)
    """Samples of them, at most, that are measured each time while a model trains, at one to four timesteps each."""
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


class LoopConfig(Config):
    """How whatever trains runs: backend, precision, memory, checkpoints, logs.

    Precision and what a bad loss does change results; the rest changes speed, memory and what is written down.
    """

    backend: Literal["plain", "deepspeed"] = "plain"
    """`plain`: every process holds everything, gradients are summed. `deepspeed`: ZeRO shards what it holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` is autocast; weights, sigma, EMA and optimiser state stay fp32."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples a process takes through the model at once (of one target, in a pack); none: global batch / world size."""
    activation_checkpointing: Literal["none", "blocks", "every_other"] = "none"
    """Recompute blocks in the backward pass instead of keeping their activations."""
    compile: bool | None = None
    """torch.compile the blocks, once for all layers; falls back with a warning. none: on a GPU with `plain`."""
    keep_freed_memory: bool = True
    """On a CPU with glibc: freed memory stays with the process for the next step, not to be faulted in again. Settings
    of your own (MALLOC_...) are left as they are."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of the deepspeed backend."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """The last K are kept (a pack keeps its last two)."""
    log_every: int = Field(50, ge=1)
    """Steps between rows in TensorBoard and metrics.jsonl."""
    eval_every: int = Field(1000, ge=1)
    """Steps between measurements of the held-out loss."""
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


class EngineConfig(LoopConfig):
    """How the loop runs one model: what `LoopConfig` has, the EMA, and pictures."""

    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights."""
    ema_warmup: bool = True
    """The decay of step t is at most (1 + t) / (10 + t); without it the decay is constant, as in DiT."""
    picture_every: int = Field(5000, ge=1)
    """Steps between pictures in TensorBoard (samples of the EMA, and what the method draws over depth)."""


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


def expand_path(path: str) -> str:
    """`~` and `$VARIABLES` in a path; URLs and `pipe:` are left alone."""
    return path if "://" in path or path.startswith("pipe:") else os.path.expandvars(os.path.expanduser(path))
