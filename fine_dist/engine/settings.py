"""Settings of the training loop: optimizer, backend, precision, memory, checkpoints, logs. Read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fine_dist.core.config import Config


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
    warmup_steps: float = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from zero; 0 starts at the full rate. A number below 1 is a
    fraction of the run's steps, such as 0.05 for a twentieth: runs of different lengths can share one setting."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: `constant`, or falling to zero at the last step, along a half cosine (`cosine`)
    or a line (`linear`). A falling rate ends at a lower loss, but such a run cannot be extended by more steps."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; none: never."""

    @property
    def depends_on_steps(self) -> bool:
        """Whether the rate of every step depends on how many steps there will be."""
        return self.schedule != "constant" or 0 < self.warmup_steps < 1


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
