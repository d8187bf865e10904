"""Arithmetic of a DiT, counted from its architecture: multiply-adds and model FLOPs.

A multiply-add is two FLOPs. Papers' "GFLOPs" of a DiT are multiply-adds; MFU here counts both operations on both sides.
Matrix products and attention are counted; norms, activations and the optimizer (under 1%) are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fine_dist.model.arch import MATRICES, TIME_FREQUENCIES, Arch


def block_macs(arch: Arch, matrices: tuple[str, ...] = MATRICES) -> int:
    """Multiply-adds of all blocks' dense matrices in one sample's forward pass (attention's own not included)."""
    return arch.num_layers * sum(arch.rows(name, 1) * m * n for name in matrices for m, n in [arch.matrix(name)])


def factored_macs(arch: Arch, rank: int, matrices: tuple[str, ...] = MATRICES) -> int:
    """As `block_macs`, through two thin products of `rank` components: `rows * rank * (m + n)` for each matrix."""
    return arch.num_layers * sum(
        arch.rows(name, 1) * rank * (m + n) for name in matrices for m, n in [arch.matrix(name)]
    )


def attention_macs(arch: Arch) -> int:
    """Multiply-adds of scores and weighted sums, all layers, one sample."""
    # Two products, q k^T and the weighted sum of v, each T x T x D over all heads.
    return arch.num_layers * 2 * arch.num_tokens**2 * arch.hidden_size


def outside_macs(arch: Arch) -> int:
    """Multiply-adds of the embedders and the final layer, one sample."""
    d, patch = arch.hidden_size, arch.patch_size**2
    per_token = arch.in_channels * patch * d + d * patch * arch.out_channels
    return arch.num_tokens * per_token + TIME_FREQUENCIES * d + d * d + 2 * d * d


def forward_macs(arch: Arch, rank: int | None = None) -> int:
    """Multiply-adds of one sample's forward pass; with a rank, every block matrix goes through its factors."""
    blocks = block_macs(arch) if rank is None else factored_macs(arch, rank)
    return blocks + attention_macs(arch) + outside_macs(arch)


def train_flops(arch: Arch) -> float:
    """FLOPs of one sample's forward and backward pass of the dense model: 3 x 2 x multiply-adds.

    Recomputation, composing factors and skipped weight gradients do not change this figure, so a cheaper compute path
    shows as a higher MFU.
    """
    return 6.0 * forward_macs(arch)


@dataclass(frozen=True)
class ModelCost:
    """The cost of one sample, in a batch of a given size, and the size of the model."""

    forward: float
    """FLOPs of a forward pass without a backward pass."""
    training: float
    """FLOPs of a forward and backward pass, given which parameters train now."""
    saved_for_backward: float
    """Numbers saved for the backward pass, minus those of a fully trained dense model; negative if fewer are saved."""
    stored: int
    """Numbers in the model's parameters."""
    trained: int
    """Numbers in the parameters that train."""


def model_cost(model: nn.Module, batch: int = 1) -> ModelCost:
    """The cost of a DiT with any kind of matrices, on any device (the meta device as well)."""
    # Distillation wraps the model that trains; the wrapper's projections are not counted.
    owner: Any = getattr(model, "student", model)
    arch = owner.arch
    forward = training = saved = 0
    for block in owner.blocks:
        for matrix in MATRICES:
            module = block.get_submodule(matrix)
            rows = arch.rows(matrix, batch)
            forward += module.multiply_adds(rows, backward=False)
            training += module.multiply_adds(rows, backward=True)
            saved += getattr(module, "saved_for_backward", _none)(rows)
            # The product of a frozen weight need not save its input. The input of o is saved by attention in any case.
            if matrix not in ("o", "adaln") and not getattr(module, "saves_input", _yes)(rows):
                saved -= rows * arch.matrix(matrix)[1]
    attention = attention_macs(arch.with_depth(len(owner.blocks)))
    rest = attention + outside_macs(arch)
    shell_trains = any(p.requires_grad for p in owner.final.parameters())
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ModelCost(
        forward=2 * (forward / batch + rest),
        # attention's backward pass costs twice its forward pass; the shell's weight gradients exist only if it trains
        training=2 * (training / batch + 3 * attention + (2 + shell_trains) * outside_macs(arch)),
        saved_for_backward=saved / batch,
        stored=sum(n for n, _ in numbers),
        trained=sum(n for n, trains in numbers if trains),
    )


def _none(rows: int) -> int:
    return 0


def _yes(rows: int) -> bool:
    return True
