"""What the training loop is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ConfigError
from fine_dist.engine.dist import World


class Batch(Protocol):
    """This rank's part of a global batch: samples in a row, of whatever kind (`fine_dist.data.stream.Batch`)."""

    def __len__(self) -> int:
        """Samples."""

    def to(self, device: torch.device) -> Any:
        """The same on a device."""

    def part(self, start: int, size: int) -> Any:
        """Some of its samples: a micro-batch."""


class Stream(Protocol):
    """An endless stream of batches (`fine_dist.data.stream`)."""

    def batches(self, start_step: int = 0) -> Iterator[Any]: ...


@dataclass
class Program:
    """What is trained on what, and how it is looked at.

    The parameters of `model` with `requires_grad` train; the others must be there again, rebuilt, when a run resumes.
    """

    model: nn.Module
    objective: Callable[[Callable[..., Tensor], Any], Tensor]
    """(model, batch) -> losses [b], fp32, one a sample."""
    stream: Stream
    """Gives a `Batch` a step; what is in it only `objective` knows."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What must match to resume (JSON values): architecture, method, rank, the data's hash, ..."""
    held_out: Callable[[nn.Module], dict[str, float]] | None = None
    """Measured on the EMA weights, on rank 0."""
    pictures: Callable[[nn.Module, int], dict[str, Tensor]] | None = None
    """(EMA model, step) -> pictures [3 or 1, H, W] in 0..1."""
    histograms: Callable[[nn.Module], dict[str, Tensor]] | None = None
    """(EMA model) -> tensors to show as histograms."""
    texts: Callable[[nn.Module], dict[str, str]] | None = None
    """(EMA model) -> texts to show, such as the words nearest to an embedding."""
    look_first: bool = False
    """Whether it is measured before the first step too."""
    before_step: Callable[[int, torch.Generator], None] | None = None
    """Called on every rank before each step, with a generator that (seed, step) seed alike on all of them."""
    flops_per_sample: float = 0.0
    """Forward and backward, in FLOPs (`model.flops.train_flops`)."""
    tokens_per_sample: int = 1
    """Tokens of one sample."""


@dataclass
class Fitted:
    """A finished run. `model` and `ema` are whole on rank 0; on other ranks of a sharded run they are not."""

    model: nn.Module
    """The trained model, dense on its device; under ZeRO-3 a gathered copy in host memory."""
    ema: dict[str, Tensor]
    """EMA of every trainable parameter, fp32, host memory; frozen parameters are not in it. Empty but on rank 0."""
    step: int
    losses: dict[str, float]
    """The last held-out measurement, and `loss`, the last row's training loss."""
    rows: list[dict[str, Any]]
    """All rows of metrics.jsonl."""
    seconds: float
    """Wall-clock seconds of this start."""
    world: World


def divide_batch(global_batch: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """(micro-batch, accumulation steps) with `global = micro x accumulation x world size`; `ConfigError` if none."""
    local, rest = divmod(global_batch, world_size)
    if rest or not local:
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
