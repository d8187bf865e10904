"""Limits of a step's speed: the measured rate of matrix products on this machine, and the number of FLOPs.

A step takes at least the time of its matrix products at that rate. `benchmarks.step_profile` shows how much of a step
is spent on other operations. A multiply-add counts as two FLOPs.

Shapes: N rows of a product (tokens, or samples for adaln), m output features, n input features.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.rows import median
from benchmarks.steps import synchronise
from fine_dist.model.arch import MATRICES, Arch

if TYPE_CHECKING:
    import torch

SIGMA_AIMS = {1: 0.93, 2: 0.60, 4: 0.45}
"""Target of the time of a sigma-only step over a dense one, by divisor: the rank is D / divisor."""
SLACK = 0.08
"""How much a sigma-only step's share of the dense step's time may exceed its share of the multiply-adds."""
SQUARE_SIDES = {"cpu": (512, 768, 1024, 2048), "cuda": (4096, 8192)}
"""Sizes of the square matrices that are tried."""

Rate = Callable[[], float]
"""A function that runs matrix products for a moment and returns their rate in FLOP/s."""


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of matrix products, for `fp32` or `bf16`."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def square_rate(precision: str, device: torch.device, seconds: float = 0.15) -> Rate:
    """The rate of products of square matrices, of the size that is fastest, which approximates the device's peak.

    Args:
        precision: `fp32` or `bf16`.
        device: The device.
        seconds: Duration of each measurement.
    """
    sides = SQUARE_SIDES["cuda" if device.type == "cuda" else "cpu"]
    rates = {side: _square(side, precision, device, seconds) for side in sides}
    return rates[max(rates, key=lambda side: rates[side]())]


def _square(side: int, precision: str, device: torch.device, seconds: float) -> Rate:
    import torch

    a = torch.randn(side, side, device=device).to(dtype_of(precision))
    return lambda: best_rate(lambda: a @ a, 2 * side**3, device, seconds)


def own_rate(arch: Arch, batch: int, precision: str, device: torch.device, seconds: float = 0.15) -> Rate:
    """The rate of all products of a layer with the model's shapes: forward and both gradients, of the five matrices.

    Args:
        arch: The architecture.
        batch: Samples in a step.
        precision: `fp32` or `bf16`.
        device: The device.
        seconds: Duration of each measurement.
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    dtype = dtype_of(precision)
    operands: list[tuple[Tensor, Tensor, Tensor]] = []
    flops = 0
    for matrix in MATRICES:
        (m, n), rows = arch.matrix(matrix), arch.rows(matrix, batch)
        x, w, g = torch.randn(rows, n), torch.randn(m, n), torch.randn(rows, m)
        operands.append((x.to(device, dtype), w.to(device, dtype), g.to(device, dtype)))
        # Three products for each matrix: the output, the input's gradient and the weight's gradient.
        flops += 3 * 2 * rows * m * n

    def layer() -> None:
        for x, w, g in operands:
            F.linear(x, w)
            torch.mm(g, w)
            torch.mm(g.t(), x)

    return lambda: best_rate(layer, flops, device, seconds)


def best_rate(body: Callable[[], object], flops: float, device: torch.device, seconds: float) -> float:
    """FLOP/s of the fastest call.

    Args:
        body: The call.
        flops: Its number of FLOPs.
        device: Device on which it computes.
        seconds: Duration of the measurement, which has at least two calls.
    """
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 2 or time.perf_counter() < end:
        synchronise(device)
        begun = time.perf_counter()
        body()
        synchronise(device)
        # The fastest call, because other processes on the machine can only make calls slower.
        best, calls = min(best, time.perf_counter() - begun), calls + 1
    return flops / best


def share(rates: list[float], seconds: list[float], flops: float) -> float:
    """Percent of a rate that a step reaches, the median over rounds.

    Args:
        rates: The rate in FLOP/s, by round.
        seconds: Seconds of the step, by round.
        flops: FLOPs of the step.
    """
    return 100 * median([flops / spent / rate for spent, rate in zip(seconds, rates)])


def sigma_bar(divisor: int, limit: float) -> float:
    """Target of a sigma-only step over the dense one at rank D / divisor; not below the limit by FLOPs plus `SLACK`."""
    return max(SIGMA_AIMS[divisor], limit + SLACK)
