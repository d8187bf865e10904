"""Tensors of a DiT carried over to another width, tile by tile: WAVE's growing grid, and what lies outside it.

A tile of w features of the target takes one of the parent's, at uniform spacing: repeated where the target is wider,
left out where it is narrower. Inputs of repeated features are divided by how often they are repeated, so that a copy
that is exact for every feature stays exact (Net2Net's rule, arXiv 1511.05641); where features are left out, the rest
are scaled for the variance of their sum.

Shapes: D width; a chunk is a part of a matrix's rows that belongs to one use (3 in qkv, 6 in adaln).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNKS = {"qkv": 3, "adaln": 6}
"""Uses that share a matrix's rows."""
INNER = {"in": 4, "out": 4}
"""Widths of the hidden layer: rows of `in`, columns of `out`."""


@dataclass(frozen=True)
class Widening:
    """From a width of `source` units to one of `target` units: features, or tiles of them."""

    source: int
    target: int

    def index(self, chunks: int = 1, times: int = 1) -> Tensor:
        """Which unit each of the target's is, [chunks x times x target]; a chunk is `times` widths long."""
        source, target = self.source * times, self.target * times
        one = torch.arange(target) * source // target
        return torch.cat([one + chunk * source for chunk in range(chunks)])

    def scale(self, times: int = 1) -> Tensor:
        """What inputs are multiplied by, [times x target]."""
        index = self.index(times=times)
        often = torch.bincount(index, minlength=self.source * times)[index].float()
        return max(1.0, self.source / self.target) ** 0.5 / often

    def of_tiles(self, side: int) -> Callable[[int, int], Tensor]:
        """The same for features, where a unit is a tile of `side` of them."""
        within = torch.arange(side)
        return lambda chunks, times: (self.index(chunks, times)[:, None] * side + within).flatten()


def wider_scalers(matrix: str, scalers: Tensor, widening: Widening) -> Tensor:
    """A matrix's scalers [K, a, b] on the target's grid [K, a', b']. widening: in tiles."""
    rows = widening.index(CHUNKS.get(matrix, 1), INNER["in"] if matrix == "in" else 1)
    times = INNER["out"] if matrix == "out" else 1
    return scalers[:, rows][:, :, widening.index(times=times)] * widening.scale(times)


def wider_bias(matrix: str, bias: Tensor, widening: Widening, side: int) -> Tensor:
    """A matrix's bias [m] at the target's width."""
    return bias[widening.of_tiles(side)(CHUNKS.get(matrix, 1), INNER["in"] if matrix == "in" else 1)]


def wider_shell(shell: dict[str, Tensor], widening: Widening, side: int) -> dict[str, Tensor]:
    """What is outside the blocks at the target's width, by the names of a DiT's state dict."""
    features = widening.of_tiles(side)
    rows, inputs = features(1, 1), widening.scale().repeat_interleave(side)
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "patch.weight": lambda t: t[rows],
        "patch.bias": lambda t: t[rows],
        "time.hidden.weight": lambda t: t[rows],
        "time.hidden.bias": lambda t: t[rows],
        "time.out.weight": lambda t: t[rows][:, rows] * inputs,
        "time.out.bias": lambda t: t[rows],
        "label.weight": lambda t: t[:, rows],
        "final.adaln.weight": lambda t: t[features(2, 1)][:, rows] * inputs,
        "final.adaln.bias": lambda t: t[features(2, 1)],
        "final.linear.weight": lambda t: t[:, rows] * inputs,
        "final.linear.bias": lambda t: t,
    }
    return {name: rules[name](tensor).contiguous() for name, tensor in shell.items()}
