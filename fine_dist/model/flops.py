"""Arithmetic of a DiT, counted from its architecture: multiply-adds, model FLOPs, and the peak they are held against.

A multiply-add is two FLOPs. Papers' "GFLOPs" of a DiT are multiply-adds; MFU here counts both operations on both sides.
What is counted: matrix products and attention; what is not: norms, activations, the optimiser (under 1%).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fine_dist.model.arch import MATRICES, Arch

if TYPE_CHECKING:
    import torch

PEAK_TFLOPS = {
    # dense bf16, without sparsity, from the vendors' data sheets; the longest name that matches wins
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "H800": 989.0,
    "H20": 148.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "RTX 6000 Ada": 364.2,
    "V100": 125.0,
    "T4": 65.0,
}
FP32_FRACTION = {"A100": 0.5, "A800": 0.5, "H100": 0.5, "H200": 0.5, "GH200": 0.5, "H800": 0.5}
"""Peak of fp32 (as TF32) over bf16's, where it is not also the default of a half."""


def block_macs(arch: Arch, matrices: tuple[str, ...] = MATRICES) -> int:
    """Multiply-adds of all blocks' dense matrices in one sample's forward pass (attention's own not included)."""
    return arch.num_layers * sum(arch.rows(name, 1) * m * n for name in matrices for m, n in [arch.matrix(name)])


def factored_macs(arch: Arch, rank: int, matrices: tuple[str, ...] = MATRICES) -> int:
    """The same through two thin products of `rank` components: `rows * rank * (m + n)` a matrix."""
    return arch.num_layers * sum(
        arch.rows(name, 1) * rank * (m + n) for name in matrices for m, n in [arch.matrix(name)]
    )


def attention_macs(arch: Arch) -> int:
    """Multiply-adds of scores and weighted sums, all layers, one sample."""
    return arch.num_layers * 2 * arch.num_tokens**2 * arch.hidden_size


def outside_macs(arch: Arch) -> int:
    """Multiply-adds of the embedders and the final layer, one sample."""
    d, patch = arch.hidden_size, arch.patch_size**2
    per_token = arch.in_channels * patch * d + d * patch * arch.out_channels
    return arch.num_tokens * per_token + 256 * d + d * d + 2 * d * d


def forward_macs(arch: Arch, rank: int | None = None) -> int:
    """Multiply-adds of one sample's forward pass; with a rank, every block matrix goes through its factors."""
    blocks = block_macs(arch) if rank is None else factored_macs(arch, rank)
    return blocks + attention_macs(arch) + outside_macs(arch)


def train_flops(arch: Arch) -> float:
    """FLOPs of one sample's forward and backward pass of the dense model: 3 x 2 x multiply-adds.

    Recomputation, composing factors and skipped weight gradients do not change this figure: MFU says how fast the
    *model* trains, and a cheaper path shows as more of it.
    """
    return 6.0 * forward_macs(arch)


def peak_flops(device: torch.device, precision: str, stated_tflops: float | None) -> float | None:
    """FLOP/s one accelerator can do: as stated, from the table, or measured on a CPU; none when it is not known."""
    import torch

    if stated_tflops is not None:
        return stated_tflops * 1e12
    if device.type == "cpu":
        return measured_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    name = torch.cuda.get_device_name(device)
    match = max((key for key in PEAK_TFLOPS if key in name), key=len, default=None)
    if match is None:
        return None
    return PEAK_TFLOPS[match] * 1e12 * (1.0 if precision == "bf16" else FP32_FRACTION.get(match, 0.5))


def measured_peak(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on this CPU with the threads torch has now: the best of a short while."""
    import torch

    n = 768
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelCost:
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


def model_cost(model: nn.Module, batch: int = 1) -> ModelCost:
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
    attention = attention_macs(arch.with_depth(len(owner.blocks)))
    rest = attention + outside_macs(arch)
    shell_trains = any(p.requires_grad for p in owner.final.parameters())
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ModelCost(
        forward=2 * (forward / batch + rest),
        # attention's backward pass is twice its forward pass; the shell's has a weight gradient only where it trains
        training=2 * (training / batch + 3 * attention + (2 + shell_trains) * outside_macs(arch)),
        kept=kept / batch,
        stored=sum(n for n, _ in numbers),
        trained=sum(n for n, trains in numbers if trains),
    )


def _none(rows: int) -> int:
    return 0
