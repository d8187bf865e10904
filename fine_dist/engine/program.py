"""The input of the training loop (`Program`) and its output (`FitResult`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ConfigError
from fine_dist.engine.settings import LoopConfig
from fine_dist.engine.stopping import Budget
from fine_dist.engine.world import World

B = TypeVar("B", bound="TrainingBatch")


class TrainingBatch(Protocol):
    """This rank's part of a global batch: samples of any kind (`fine_dist.data.batch.Batch`)."""

    def __len__(self) -> int:
        """Number of samples."""

    def to(self: B, device: torch.device) -> B:
        """The same batch on a device."""

    def part(self: B, start: int, size: int) -> B:
        """A micro-batch: `size` samples from `start` on."""


class Stream(Protocol):
    """An endless stream of batches (`fine_dist.data.stream`)."""

    def batches(self, start_step: int = 0) -> Iterator[TrainingBatch]:
        """Batches of this rank, starting with the batch of step `start_step`."""


@dataclass
class Program:
    """A model, its loss and data, and its evaluation during training.

    The parameters of `model` that require gradients are trained. Frozen parameters are not in checkpoints: the caller
    must create them with the same values when a run resumes.
    """

    model: nn.Module
    objective: Callable[[Callable[..., Tensor], Any], Tensor]
    """(model, batch) -> losses [b], fp32, one per sample."""
    stream: Stream
    """Yields one `TrainingBatch` per step, whose content only `objective` reads."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Values that must match when a run resumes (JSON): architecture, method, rank, the data's hash."""
    held_out: Callable[[nn.Module], dict[str, float]] | None = None
    """(model with EMA weights) -> named numbers, on rank 0."""
    previews: Callable[[nn.Module, int, Budget], dict[str, Tensor]] | None = None
    """(model with EMA weights, step, budget) -> named images [3 or 1, H, W] in 0..1. It returns early, with fewer
    images, when the budget is used up or a stop is requested."""
    histograms: Callable[[nn.Module], dict[str, Tensor]] | None = None
    """(model with EMA weights) -> named tensors to log as histograms."""
    texts: Callable[[nn.Module], dict[str, str]] | None = None
    """(model with EMA weights) -> named texts, such as the words nearest to an embedding."""
    hparams: dict[str, Any] = field(default_factory=dict)
    """Settings by name, for the trackers' tables of runs."""
    evaluate_first: bool = False
    """Whether the model is also evaluated before the first step."""
    before_step: Callable[[int, torch.Generator], None] | None = None
    """(step, generator) -> None, called on every rank before each step. The generator is seeded by (seed, step)."""
    term_names: tuple[str, ...] = ()
    """Names of the loss terms, if there are several; each is logged as `loss_NAME`."""
    take_terms: Callable[[], Tensor] | None = None
    """() -> sums of the terms over this rank's samples since the last call, fp64 [terms], on the device."""
    flops_per_sample: float = 0.0
    """FLOPs of the forward and backward pass of one sample (`fine_dist.model.flops.train_flops`)."""
    tokens_per_sample: int = 1
    """Number of tokens of one sample."""


@dataclass
class FitResult:
    """A finished run. `model` and `ema` are complete on rank 0; on other ranks of a sharded run they are not."""

    model: nn.Module
    """The trained model on its device; with a sharding backend, a copy with the gathered weights."""
    ema: dict[str, Tensor]
    """EMA of all trained parameters (fp32, host memory), on rank 0."""
    step: int
    losses: dict[str, float]
    """The last held-out measurement, and `loss`, the training loss of the last row."""
    rows: list[dict[str, Any]]
    """All rows of metrics.jsonl."""
    seconds: float
    """Wall-clock seconds of training, including earlier starts."""
    world: World


def divide_batch(global_batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """The micro-batch and the accumulation steps, with `global = micro x accumulation x world size`.

    Raises:
        ConfigError: The global batch cannot be divided that way; the message names values that can.
    """
    # Ranks need equal shares, because the loss is a mean over the global batch and gradients are summed unweighted.
    local, remainder = divmod(global_batch, world_size)
    if remainder or not local:
        near = max(1, round(global_batch / world_size)) * world_size
        raise ConfigError(
            f"global batch {global_batch} cannot be divided over {world_size} processes; the nearest that can: {near}"
        )
    micro = micro_batch or local
    if local % micro:
        legal = [n for n in range(1, local + 1) if local % n == 0]
        raise ConfigError(
            f"engine.micro_batch: {micro} does not divide the {local} samples a process has (global batch "
            f"{global_batch} over {world_size} processes); legal: {', '.join(map(str, legal))}"
        )
    return micro, local // micro


def may_skip(engine: LoopConfig, skipped: int) -> bool:
    """Whether a step whose loss or gradient is not finite is skipped, after `skipped` earlier ones; else training ends.

    The loop and packs share this rule, so that `engine.on_bad_loss` and `engine.max_bad_steps` mean the same in both.
    """
    return engine.on_bad_loss == "skip" and skipped < engine.max_bad_steps


def explain_stop(engine: LoopConfig, skipped: int) -> str:
    """Why a step that is not finite ends training, after `skipped` others were skipped, and what the user can do."""
    if engine.on_bad_loss == "stop":
        return (
            "nothing was updated and the last good checkpoint is kept. Lower optim.lr, or set "
            "engine.on_bad_loss to skip"
        )
    return (
        f"{skipped + 1} steps were bad and engine.max_bad_steps is {engine.max_bad_steps}. The last good checkpoint is "
        "kept"
    )
