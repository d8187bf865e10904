"""What this machine and the arithmetic allow: the rate of matrix products, measured, and FLOPs counted.

No step can be faster than its products at the rate that products run at here; a part of the distance to it is what
`benchmarks.step_profile` shows as room. A multiply-add is two FLOPs.

Shapes: N rows of a product (tokens, or samples for adaln), m out and n in features.
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
"""Sigma-only step over the dense step, for rank D / key."""
SLACK = 0.08
"""What a sigma-only step may take beyond the share of multiply-adds that it still has to do."""
SQUARE_SIDES = {"cpu": (512, 768, 1024, 2048), "cuda": (4096, 8192)}

Rate = Callable[[], float]
"""Measures for a moment and gives FLOP/s."""


def dtype_of(precision: str) -> torch.dtype:
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def square_rate(precision: str, device: torch.device, seconds: float = 0.15) -> Rate:
    """The rate of the square product that is fastest here, of a few sizes: what a data sheet would call the peak."""
    sides = SQUARE_SIDES["cuda" if device.type == "cuda" else "cpu"]
    rates = {side: _square(side, precision, device, seconds) for side in sides}
    return rates[max(rates, key=lambda side: rates[side]())]


def _square(side: int, precision: str, device: torch.device, seconds: float) -> Rate:
    import torch

    a = torch.randn(side, side, device=device).to(dtype_of(precision))
    return lambda: best_rate(lambda: a @ a, 2 * side**3, device, seconds)


def own_rate(arch: Arch, batch: int, precision: str, device: torch.device, seconds: float = 0.15) -> Rate:
    """The rate over all products of a layer at their own shapes: forward, and both gradients, of the five matrices."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    dtype = dtype_of(precision)
    sets: list[tuple[Tensor, Tensor, Tensor]] = []
    flops = 0
    for matrix in MATRICES:
        (m, n), rows = arch.matrix(matrix), arch.rows(matrix, batch)
        x, w, g = torch.randn(rows, n), torch.randn(m, n), torch.randn(rows, m)
        sets.append((x.to(device, dtype), w.to(device, dtype), g.to(device, dtype)))
        # Three products a matrix (output, input's gradient, weight's gradient), two FLOPs a multiply-add.
        flops += 3 * 2 * rows * m * n

    def layer() -> None:
        for x, w, g in sets:
            F.linear(x, w)
            torch.mm(g, w)
            torch.mm(g.t(), x)

    return lambda: best_rate(layer, flops, device, seconds)


def best_rate(body: Callable[[], object], flops: float, device: torch.device, seconds: float) -> float:
    """FLOP/s of the fastest call within so many seconds, two calls at least."""
    best, calls, end = float("inf"), 0, time.perf_counter() + seconds
    while calls < 2 or time.perf_counter() < end:
        synchronise(device)
        begun = time.perf_counter()
        body()
        synchronise(device)
        # The fastest and not the mean: a rate is what the machine can do, and others' work only makes it slower.
        best, calls = min(best, time.perf_counter() - begun), calls + 1
    return flops / best


def share(rates: list[float], seconds: list[float], flops: float) -> float:
    """Percent of a rate that a step's arithmetic reaches: the median over rounds."""
    return 100 * median([flops / spent / rate for spent, rate in zip(seconds, rates)])


def sigma_bar(divisor: int, limit: float) -> float:
    """The aim at rank D / divisor, or the arithmetic's limit and some slack, whichever is larger."""
    return max(SIGMA_AIMS[divisor], limit + SLACK)
