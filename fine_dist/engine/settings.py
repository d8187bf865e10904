"""Settings of the training loop: optimizer, backend, precision, memory, checkpoints, logs. Read without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config, PathKey
from fine_dist.engine.trackers import TrackerNames

BUCKET_BYTES = 25 * 2**20
"""Bytes of gradients that the plain backend sends at once: enough for full bandwidth, and few enough that the last
bucket, which no computation hides, is a small part of all."""

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Of a moment: with 1 nothing would ever be added to it."""


class OptimConfig(Config):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate after the warm-up. 1e-4 is DiT's; sigma alone takes 10 to 300 times as much."""
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
        """Whether the rate of every step depends on how many steps there will be."""
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
    """JSON file with more of DeepSpeed's keys. A key that contradicts this config is an error, never an override."""


class LoopConfig(Config):
    """How training runs: backend, precision, memory, checkpoints, logs.

    Precision and what a bad loss does change results; the rest changes speed, memory and what is written.
    """

    backend: Literal["plain", "deepspeed", "fsdp2"] = "plain"
    """What holds the weights: `plain` holds all of them in every process and sums gradients; `deepspeed` shards them
    with ZeRO, and `fsdp2` with torch's own `fully_shard`, for models that do not fit otherwise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs: `auto` takes a GPU of NVIDIA (CUDA) or AMD (ROCm) when there is one, and `cuda` insists."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the model: `fp32` is exact, `tf32` lets a GPU round the inputs of fp32 products to 10 bits (several
    times faster), and `bf16` is autocast. Weights, averages and optimizer state are fp32 in all of them."""
    micro_batch: int | None = Field(None, ge=1, le=2**20)
    """Samples that a process takes through the model at once (of each target, in a pack). None takes its whole share of
    the global batch; lower it when memory runs out, and the rest is accumulated."""
    activation_checkpointing: Literal["none", "blocks", "every_other"] = "none"
    """Which blocks compute their activations again in the backward pass instead of keeping them: a third more time for
    a fraction of the memory."""
    compile: bool | None = None
    """Compile the blocks with torch.compile, once for all layers. None compiles on a GPU with the plain backend where a
    C compiler is installed. When compilation fails, a warning says so and training goes on without it."""
    keep_freed_memory: bool = True
    """On a CPU with glibc, keep freed memory for the next step, which makes steps some 15% faster. Variables of your
    own (MALLOC_...) are left as they are."""
    bf16_copies: bool = True
    """In bf16 with the plain backend, keep bf16 copies of the weights for matrix products beside the fp32 weights that
    train, instead of casting each weight at each use: fewer kernels, for 2 bytes a weight. Checkpoints hold
    the fp32 weights either way."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients travel between processes. `bf16` halves the traffic, for a slow network, and rounds the
    gradient of each process to 8 bits before they are summed."""
    gather_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which fsdp2 gathers weights. `bf16` halves the traffic and the memory of gathered weights; the shards
    that the optimizer updates stay fp32. It needs precision bf16, whose products round the weights to bf16 anyway."""
    deterministic: bool = False
    """Choose algorithms that give the same bits in every run, on a GPU some 10% slower. With it a resumed run is
    bit-identical on a GPU too, on the same number of the same devices; on a CPU it always is."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of the deepspeed backend."""
    checkpoint_every: int = Field(1000, ge=1, le=1_000_000_000)
    """Steps between two checkpoints; a killed run loses at most so many."""
    keep_checkpoints: int = Field(2, ge=1, le=1_000_000)
    """Number of newest checkpoints that are kept (a pack keeps two)."""
    log_every: int = Field(50, ge=1, le=1_000_000_000)
    """Steps between two rows in metrics.jsonl and in the trackers."""
    tracker: TrackerNames = ("tensorboard",)
    """Where curves and pictures of a run are shown, one or several: `tensorboard` (files in the run directory),
    `wandb`, `mlflow`, or `none`. A tracker that fails never ends a run; metrics.jsonl is always written."""
    eval_every: int = Field(1000, ge=1, le=1_000_000_000)
    """Steps between two measurements of the held-out loss."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """What a loss that is NaN or Inf does: `stop` ends the run with the last good checkpoint, `skip` leaves out the
    step."""
    max_bad_steps: int = Field(10, ge=1, le=1_000_000_000)
    """Number of steps that `skip` leaves out before it stops as well."""
    time_limit_min: float | None = Field(None, gt=0)
    """Minutes after which the run saves and exits with code 75, so that a scheduler starts it again. None: never."""
    threads: int | None = Field(None, ge=1, le=4_096)
    """CPU threads of a process. None leaves the choice to torch."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one accelerator in TFLOP/s, for MFU. None takes it from a table of accelerators, or measures a CPU's."""

    @model_validator(mode="after")
    def _gathers_what_it_computes_in(self) -> LoopConfig:
        if self.gather_dtype == "bf16" and (self.backend, self.precision) != ("fsdp2", "bf16"):
            raise ValueError(
                f"gather_dtype bf16 needs backend fsdp2 and precision bf16, not {self.backend} and {self.precision}"
            )
        return self


class EngineConfig(LoopConfig):
    """How one model trains: all of `LoopConfig`, with averaged weights and previews."""

    residual_dtype: Literal["fp32", "bf16"] = "fp32"
    """In what a bf16 run holds the sum over layers, to which each block adds. `bf16` saves memory and casts, and rounds
    the sum to 8 bits after every block; `fp32` keeps all that small contributions add."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, which is what a run's artifact holds. 0 turns it off."""
    ema_warmup: bool = True
    """Bound the decay of update t by (1 + t) / (10 + t), so that a short run's average has left its initial weights
    behind. Without it the decay is constant, as in DiT."""
    preview_every: int = Field(5000, ge=1, le=1_000_000_000)
    """Steps between two previews in the trackers: images from the averaged weights, and the method's tables over
    depth."""

    @model_validator(mode="after")
    def _sums_what_it_computes_in(self) -> EngineConfig:
        if self.residual_dtype == "bf16" and self.precision != "bf16":
            raise ValueError(f"residual_dtype bf16 needs precision bf16, not {self.precision}; set both")
        return self
