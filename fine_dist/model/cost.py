"""What a step of a model costs, asked of the modules that do the work.

A matrix of a block says its own multiply-adds (`multiply_adds(rows, backward=)`) and, where its backward pass keeps
more than a dense product's does, how much (`kept_numbers(rows)`). What is counted besides: attention, the embedders
and the final layer. A multiply-add is two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fine_dist.model.arch import MATRICES
from fine_dist.model.flops import attention_macs, outside_macs

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Cost:
    """Of one sample, in a batch of the size that was asked for; and of the model."""

    forward: float
    """FLOPs of a forward pass without a backward pass."""
    training: float
    """FLOPs of a forward and backward pass as things train now."""
    kept: float
    """Numbers that the backward pass keeps beyond those of a dense model's."""
    stored: int
    """Numbers in the model's parameters."""
    trained: int
    """Those of them that train."""


def model_cost(model: nn.Module, batch: int = 1) -> Cost:
    """The cost of a DiT of whatever matrices, on any device (meta as well)."""
    owner: Any = getattr(model, "student", model)
    arch = owner.arch
    forward = training = kept = 0
    for block in owner.blocks:
        for matrix in MATRICES:
            module = block.get_submodule(matrix)
            rows = arch.rows(matrix, batch)
            forward += module.multiply_adds(rows, backward=False)
            training += module.multiply_adds(rows, backward=True)
            kept += getattr(module, "kept_numbers", _none)(rows)
    rest = attention_macs(arch) + outside_macs(arch)
    shell_trains = any(p.requires_grad for p in owner.final.parameters())
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Cost(
        forward=2 * (forward / batch + rest),
        # attention's backward pass is twice its forward pass; the shell's has a weight gradient only where it trains
        training=2 * (training / batch + 3 * attention_macs(arch) + (2 + shell_trains) * outside_macs(arch)),
        kept=kept / batch,
        stored=sum(n for n, _ in numbers),
        trained=sum(n for n, trains in numbers if trains),
    )


def _none(rows: int) -> int:
    return 0
