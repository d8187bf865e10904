"""Settings of the training loop: optimizer, backend, precision, memory, checkpoints, logs. Read without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config, PathKey
from fine_dist.engine.trackers import TrackerNames

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients in one all-reduce of the plain backend: large enough for full bandwidth, and small enough that the
last bucket, whose all-reduce overlaps with no computation, is a small part of the total."""

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay of one of AdamW's moments. 1 is excluded, because such a moment would never change."""


class OptimConfig(Config):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate after the warm-up. DiT uses 1e-4; training sigma alone needs 10 to 300 times as much."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Number added to the denominator of AdamW's update."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay. DiT trains without it."""
    warmup_steps: float = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from zero; 0 starts at the full rate. A number below 1 is a
    fraction of the run's steps, such as 0.05 for a twentieth: runs of different lengths can share one setting."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: `constant`, or falling to zero at the last step, along a half cosine (`cosine`)
    or a line (`linear`). A falling rate ends at a lower loss, but such a run cannot be extended by more steps."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global norm of the gradients; larger ones are scaled down to it. None never scales."""

    @property
    def depends_on_steps(self) -> bool:
        """Whether the learning rate of a step depends on the total number of steps."""
        return self.schedule != "constant" or 0 < self.warmup_steps < 1


class DeepSpeedConfig(Config):
    """DeepSpeed's ZeRO. Its JSON is generated from these fields."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over processes: 0 nothing, 1 the optimizer's state, 2 gradients as well, 3 weights as well."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory and update there: slower, for a model that does not fit otherwise."""
    offload_params: bool = False
    """Keep the weights in host memory as well (stage 3)."""
    extra: PathKey | None = None
    """JSON file with further DeepSpeed keys. A key that contradicts this config is an error, never an override."""


class LoopConfig(Config):
    """How training runs: backend, precision, memory, checkpoints, logs.

    Only the data types, `deterministic`, `on_bad_loss` and `max_bad_steps` change results. All other settings change
    speed, memory and what is written.
    """

    backend: Literal["plain", "deepspeed", "fsdp2"] = "plain"
    """Distribution of the weights: `plain` keeps all of them in every process and sums gradients; `deepspeed` shards
    them with ZeRO, and `fsdp2` with torch's `fully_shard`, for models that do not fit into one process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model: `auto` uses an NVIDIA (CUDA) or AMD (ROCm) GPU if there is one, `cuda` requires one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the model: `fp32` is exact, `tf32` lets a GPU round the inputs of fp32 products to 10 bits (several
    times faster), and `bf16` is autocast. Weights, averages and optimizer state are fp32 in all of them."""
    micro_batch: int | None = Field(None, ge=1, le=2**20)
    """Samples in one forward and backward pass of a process (of each target, in a pack). Lower it when memory runs out;
    gradients are then accumulated over several passes. Default: the process's full share of the global batch."""
    activation_checkpointing: Literal["none", "blocks", "every_other"] = "none"
    """Blocks that recompute their activations in the backward pass instead of storing them: a third more time for a
    fraction of the memory."""
    compile: bool | None = None
    """Compile the blocks with torch.compile, once for all layers. None compiles on a GPU with the plain backend where a
    C compiler is installed. If compilation fails, a warning is logged and training continues without it."""
    keep_freed_memory: bool = True
    """On a CPU with glibc, keep freed memory for the next step, which makes steps some 15% faster. It has no effect
    when the environment sets a MALLOC_... variable."""
    bf16_copies: bool = True
    """In bf16 with the plain backend, keep bf16 copies of the fp32 weights for matrix products instead of casting each
    weight at each use: fewer kernels, for 2 bytes per weight. Checkpoints hold the fp32 weights in both cases."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of gradients in the all-reduce between processes. `bf16` halves the traffic, which helps on a slow
    network, and rounds each process's gradient to 8 bits before the sum."""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type in which fsdp2 gathers weights. `bf16` halves the traffic and the memory of gathered weights; the
    shards that the optimizer updates stay fp32. It needs precision bf16, whose products round the weights to bf16
    anyway."""
    deterministic: bool = False
    """Use only deterministic algorithms, which makes a GPU some 10% slower. A resumed run is then bit-identical on a
    GPU as well, given the same number of the same devices; on a CPU it always is."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of the deepspeed backend."""
    checkpoint_every: int = Field(1000, ge=1, le=1_000_000_000)
    """Steps between two checkpoints; a killed run loses at most this many steps."""
    keep_checkpoints: int = Field(2, ge=1, le=1_000_000)
    """Number of checkpoints to keep, the newest ones; older ones are deleted. A pack always keeps two."""
    log_every: int = Field(50, ge=1, le=1_000_000_000)
    """Steps between two rows in metrics.jsonl and in the trackers."""
    tracker: TrackerNames = ("tensorboard",)
    """One or several trackers for curves and images of a run: `tensorboard` (files in the run directory), `wandb`,
    `mlflow`, or `none`. A tracker that fails never ends a run; metrics.jsonl is always written."""
    eval_every: int = Field(1000, ge=1, le=1_000_000_000)
    """Steps between two measurements of the held-out loss."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """Reaction to a NaN or Inf loss: `stop` ends the run and keeps the last good checkpoint, `skip` omits the
    update."""
    max_bad_steps: int = Field(10, ge=1, le=1_000_000_000)
    """Number of steps that `skip` may omit before the run stops after all."""
    time_limit_min: float | None = Field(None, gt=0)
    """Minutes after which the run saves and exits with code 75, so that a scheduler restarts it. Default: no limit."""
    threads: int | None = Field(None, ge=1, le=4_096)
    """CPU threads of a process. Default: torch's choice."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one accelerator in TFLOP/s, for MFU. Default: from a table of accelerators; a CPU's is measured."""

    @model_validator(mode="after")
    def _check_gather_dtype(self) -> LoopConfig:
        if self.gather_dtype == "bf16" and (self.backend, self.precision) != ("fsdp2", "bf16"):
            raise ValueError(
                f"gather_dtype bf16 needs backend fsdp2 and precision bf16, not {self.backend} and {self.precision}"
            )
        return self


class EngineConfig(LoopConfig):
    """How one model trains: the settings of `LoopConfig`, the EMA of the weights, and previews."""

    residual_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the residual stream in a bf16 run. `bf16` saves memory and casts, but rounds the stream to 8 bits
    after every block; `fp32` keeps small contributions of single blocks."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average (EMA) of the weights, which a run's artifact stores. 0 turns it off."""
    ema_warmup: bool = True
    """Limit the decay of update t to (1 + t) / (10 + t), so that the EMA of a short run forgets the initial weights.
    Without it the decay is constant, as in DiT."""
    preview_every: int = Field(5000, ge=1, le=1_000_000_000)
    """Steps between two previews in the trackers: images sampled from the EMA, and the method's tables over depth."""

    @model_validator(mode="after")
    def _check_residual_dtype(self) -> EngineConfig:
        if self.residual_dtype == "bf16" and self.precision != "bf16":
            raise ValueError(f"residual_dtype bf16 needs precision bf16, not {self.precision}; set both")
        return self
