"""The interface between the training loop and what holds the weights; plain, DeepSpeed and FSDP2 implement it.

A backend owns the trained parameters, their optimizer, and the sum of gradients over ranks. It exposes its fp32 master
weights as *pieces*: flat ranges of named parameters. EMA, checkpoints and gathering use only pieces, so that they are
the same for one process, ZeRO and FSDP2, and any backend can read a checkpoint of any other.

Shapes: a parameter has `numel` values, flattened; a piece is [stop - start] of them, fp32.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.dist import gather_objects
from fine_dist.engine.host_copy import copy_to_host
from fine_dist.engine.world import World


@dataclass(frozen=True)
class Piece:
    """A range of one parameter that this rank owns."""

    name: str
    shape: tuple[int, ...]
    """Full shape of the parameter."""
    start: int
    weight: Tensor
    """The values from `start` on, flat, fp32: a view of the tensor that the optimizer updates."""

    @property
    def stop(self) -> int:
        return self.start + self.weight.numel()


class Backend(ABC):
    """Weights, optimizer and gradient reduction of one run.

    A step calls `backward` once per micro-batch, then `step`. No call needs to wait for the device.
    """

    model: nn.Module
    """The model that the objective calls."""
    world: World

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """A context for the forward and backward passes of a step, in which the model may use copies of its weights.

        Outside it the model's parameters are the fp32 master weights.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        """Add the gradient of `losses.sum() / global_batch`.

        Args:
            losses: [b] fp32, one per sample.
            global_batch: Samples of the step over all ranks and micro-batches.
            last: Whether this is the last micro-batch of the step, so that the sum over ranks may start.
        """

    @abstractmethod
    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        """Sum gradients over ranks, clip, update the weights and clear the gradients.

        Args:
            lr: Learning rate of this update.
            good: bool [] on the device: whether the losses of all ranks are finite. None: they are.

        Returns:
            The global norm of the gradients before clipping, [] on the device. If it is not finite, or `good` is false,
            weights and optimizer do not change.
        """

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The ranges of the trained weights that this rank owns. Each value is owned by exactly one rank."""

    @abstractmethod
    def moments(self, piece: Piece) -> dict[str, Tensor]:
        """AdamW's moments of a piece as flat fp32 views; empty before the first update."""

    @abstractmethod
    def optimizer_steps(self) -> dict[str, int]:
        """Number of updates of each owned parameter, by name, which AdamW's bias correction needs."""

    @abstractmethod
    def load(self, checkpoint: CheckpointReader) -> None:
        """Load weights and optimizer state from a checkpoint of any backend, stage and world size."""

    @abstractmethod
    def gather(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather values of all pieces on rank 0. All ranks must call it.

        Args:
            values: A flat tensor for each owned piece, by parameter name.

        Returns:
            Full tensors (fp32, host memory) by parameter name on rank 0; empty on other ranks.
        """

    def weights(self) -> dict[str, Tensor]:
        """All trained weights as full tensors (fp32, host memory) on rank 0; empty on other ranks."""
        return self.gather({piece.name: piece.weight for piece in self.pieces()})


SEND_VALUES = 1 << 24
"""Number of fp32 values in one message when shards are gathered: 64 MiB."""


class ShardedBackend(Backend):
    """A backend whose ranks own different pieces.

    A subclass sets `shapes`, and calls `share_layout` once its pieces are known or sets `_layout` itself.
    """

    shapes: dict[str, tuple[int, ...]]
    """Full shapes of the trained parameters, by name."""
    _layout: list[list[tuple[str, int, int]]]
    """The ranges (name, start, stop) that each rank owns, in the order of its pieces."""

    def share_layout(self) -> None:
        """Exchange the ranges that each rank owns. All ranks must call it."""
        # Ranges do not change during training, so they are exchanged once, and a gather sends only values.
        layout = [[piece.name, piece.start, piece.stop] for piece in self.pieces()]
        self._layout = gather_objects(layout, self.world)

    def gather(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each rank sends its pieces, in order, as one flat tensor, and rank 0 copies them into full tensors."""
        own_parts = copy_to_host([values[piece.name].reshape(-1) for piece in self.pieces()])
        if not self.world.is_main:
            if own_parts:
                for part in torch.cat(own_parts).split(SEND_VALUES):
                    torch.distributed.send(part, 0)
            return {}
        # `empty` is safe, because every value is owned by one rank
        # and therefore overwritten.
        gathered = {name: torch.empty(math.prod(shape)) for name, shape in self.shapes.items()}
        # Ranks are received one after the other. Rank 0's network link limits the time in any order, and
        # this way it holds only one rank's values besides the result.
        for rank, layout in enumerate(self._layout):
            sizes = [stop - start for _, start, stop in layout]
            if rank == 0:
                parts = own_parts
            else:
                flat = torch.empty(sum(sizes))
                for part in flat.split(SEND_VALUES) if layout else ():
                    torch.distributed.recv(part, rank)
                parts = list(flat.split(sizes)) if layout else []
            for (name, start, stop), part in zip(layout, parts):
                gathered[name][start:stop] = part
        return {name: tensor.view(self.shapes[name]) for name, tensor in gathered.items()}
