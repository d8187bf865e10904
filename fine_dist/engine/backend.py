"""The interface between the training loop and what holds the weights; plain, DeepSpeed and FSDP2 implement it.

A backend owns the parameters that train, their optimizer, and the way gradients are summed over ranks. It shows its
fp32 master weights as *pieces*: flat ranges of named parameters. EMA, checkpoints and gathering work on pieces alone,
so they are the same for one process, ZeRO and FSDP2, and any backend reads a checkpoint of any other.

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
    """Shape of the whole parameter."""
    start: int
    weight: Tensor
    """The values from `start`, flat, fp32: a live view of what the optimizer updates."""

    @property
    def stop(self) -> int:
        return self.start + self.weight.numel()


class Backend(ABC):
    """Weights, optimizer and gradient sums of one run.

    A step calls `backward` once a micro-batch, then `step`. No call has to wait for the device.
    """

    model: nn.Module
    """What the objective calls."""
    world: World

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """A context for the forward and backward passes of a step, in which the model may hold copies of its weights.

        Outside it the model's parameters are the fp32 weights that train.
        """
        return contextlib.nullcontext()

    @abstractmethod
    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        """Add the gradient of `losses.sum() / global_batch`.

        Args:
            losses: [b] fp32, one a sample.
            global_batch: Samples of the step over all ranks and micro-batches.
            last: Whether this is the step's last micro-batch, after which gradients may be summed over ranks.
        """

    @abstractmethod
    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        """Sum gradients over ranks, clip, update and forget the gradients.

        Args:
            lr: Learning rate of this update.
            good: bool [] on the device: whether the losses of all ranks are finite; None: they are.

        Returns:
            The global norm of the gradients before clipping, [] on the device. Where it is not finite, or `good` is
            false, weights and optimizer stay as they are.
        """

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this rank owns of the weights that train; over all ranks, each value is owned once."""

    @abstractmethod
    def moments(self, piece: Piece) -> dict[str, Tensor]:
        """AdamW's state of a piece as flat fp32 views; empty before the first update."""

    @abstractmethod
    def optimizer_steps(self) -> dict[str, int]:
        """Updates that each owned parameter has had, by name (AdamW corrects its bias by them)."""

    @abstractmethod
    def load(self, checkpoint: CheckpointReader) -> None:
        """Set weights and optimizer from a checkpoint of any backend, stage and world size."""

    @abstractmethod
    def gather(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put values of pieces together, on rank 0; all ranks call it.

        Args:
            values: A flat tensor for each owned piece, by parameter name.

        Returns:
            Whole tensors (fp32, host memory) by parameter name on rank 0, nothing on other ranks.
        """

    def weights(self) -> dict[str, Tensor]:
        """All weights that train, whole (fp32, host memory), on rank 0."""
        return self.gather({piece.name: piece.weight for piece in self.pieces()})


SEND_VALUES = 1 << 24
"""Values (fp32) in one message when shards are gathered: 64 MiB."""


class ShardedBackend(Backend):
    """A backend whose ranks own different pieces.

    An implementation sets `shapes`, and calls `share_layout` once its pieces are known or sets `_layout` itself.
    """

    shapes: dict[str, tuple[int, ...]]
    """Shapes of the whole parameters that train, by name."""
    _layout: list[list[tuple[str, int, int]]]
    """The ranges (name, start, stop) that each rank owns, in the order of its pieces."""

    def share_layout(self) -> None:
        """Tell every rank which ranges each rank owns. All ranks call it."""
        # Ranges are fixed once training begins, so they are exchanged once; a gather then sends nothing but values.
        mine = [[piece.name, piece.start, piece.stop] for piece in self.pieces()]
        self._layout = gather_objects(mine, self.world)

    def gather(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each rank sends its pieces, in order, as one flat tensor; rank 0 puts them where they belong."""
        mine = copy_to_host([values[piece.name].reshape(-1) for piece in self.pieces()])
        if not self.world.is_main:
            if mine:
                for part in torch.cat(mine).split(SEND_VALUES):
                    torch.distributed.send(part, 0)
            return {}
        # `empty` is safe although nothing clears it: over all ranks
        # each value is owned once, so every one is overwritten.
        whole = {name: torch.empty(math.prod(shape)) for name, shape in self.shapes.items()}
        # Ranks are received one after the other. Rank 0 is the only receiver, so its network link bounds the
        # time anyway, and the order keeps it from holding more than one rank's values beside the result.
        for rank, layout in enumerate(self._layout):
            sizes = [stop - start for _, start, stop in layout]
            if rank == 0:
                parts = mine
            else:
                flat = torch.empty(sum(sizes))
                for part in flat.split(SEND_VALUES) if layout else ():
                    torch.distributed.recv(part, rank)
                parts = list(flat.split(sizes)) if layout else []
            for (name, start, stop), part in zip(layout, parts):
                whole[name][start:stop] = part
        return {name: tensor.view(self.shapes[name]) for name, tensor in whole.items()}
