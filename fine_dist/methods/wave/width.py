"""Tensors of a DiT carried over to another width at uniform spacing: WAVE's growing grid, and what lies outside it.

A feature of the target takes one of the parent's: repeated where the target is wider, left out where it is narrower.
With `kron(S, T)` whole tiles are repeated, with `kron(T, S)`, whose templates' entries lie apart, features one by one;
either way the scalers' grid grows uniformly, and what lies outside follows the same features. Inputs of repeated
features are divided by how often they are repeated, so that a copy that is exact for every feature stays exact (the
rule of Net2Net, arXiv 1511.05641); where features are left out, the rest are scaled for the variance of their sum.

Shapes: D width, w a template's side, K templates, a and b the grid of a matrix's scalers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNKS = {"qkv": 3, "adaln": 6}
"""Number of equal chunks in a matrix's rows (q, k and v; the six vectors of adaLN)."""
LONG_ROWS, LONG_COLUMNS = {"in": 4}, {"out": 4}
"""Multiples of the width D in a matrix's rows or columns, for the MLP's hidden layer."""


def uniform(source: int, target: int, chunks: int = 1) -> Tensor:
    """The unit of `source` that each unit of `target` copies, within each chunk: int64 [chunks x target]."""
    # In integers: repeats and gaps are spread evenly, and equal widths give the identity.
    one = torch.arange(target) * source // target
    return torch.cat([one + chunk * source for chunk in range(chunks)])


def fan_in(source: int, target: int) -> Tensor:
    """Factors of the inputs that `uniform` selects, [target]."""
    index = uniform(source, target)
    # A feature that is repeated k times is summed k times by the next matrix, so each copy counts 1/k.
    often = torch.bincount(index, minlength=source)[index].float()
    scale: Tensor = max(1.0, source / target) ** 0.5 / often
    return scale


@dataclass(frozen=True)
class Widening:
    """From D features to others.

    side: w, which divides both. tiles: whether whole tiles of w features are taken; else features one by one.
    """

    source: int
    target: int
    side: int
    tiles: bool

    def features(self, chunks: int = 1, times: int = 1) -> Tensor:
        """The parent's feature that each of the target's features copies, int64 [chunks x times x target]."""
        unit = self.side if self.tiles else 1
        index = uniform(self.source // unit * times, self.target // unit * times, chunks)
        return (index[:, None] * unit + torch.arange(unit)).flatten()

    def inputs(self) -> Tensor:
        """Factors of weights whose inputs are these features, [target]."""
        unit = self.side if self.tiles else 1
        return fan_in(self.source // unit, self.target // unit).repeat_interleave(unit)

    def scalers(self, matrix: str, scalers: Tensor) -> Tensor:
        """A matrix's scalers [K, a, b] resampled to the target's grid [K, a', b']."""
        source, target = self.source // self.side, self.target // self.side
        chunks, long = CHUNKS.get(matrix, 1), LONG_ROWS.get(matrix, 1)
        if not self.tiles:  # entries of all chunks lie between each other, and the whole grid is stretched
            chunks, long = 1, chunks * long
        rows = uniform(source * long, target * long, chunks)
        deep = LONG_COLUMNS.get(matrix, 1)
        columns, scale = uniform(source * deep, target * deep), fan_in(source * deep, target * deep)
        return scalers[:, rows][:, :, columns] * scale

    def bias(self, matrix: str, bias: Tensor) -> Tensor:
        """A matrix's bias [m] at the target's width."""
        return bias[self.features(CHUNKS.get(matrix, 1), LONG_ROWS.get(matrix, 1))]

    def shell(self, shell: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors outside the blocks at the target's width, by the names of a DiT's state dict."""
        rows, pairs, inputs = self.features(), self.features(2), self.inputs()
        rules = {
            "patch.weight": lambda t: t[rows],
            "patch.bias": lambda t: t[rows],
            "time.hidden.weight": lambda t: t[rows],
            "time.hidden.bias": lambda t: t[rows],
            "time.out.weight": lambda t: t[rows][:, rows] * inputs,
            "time.out.bias": lambda t: t[rows],
            # An embedding's rows are classes; only its columns are features.
            "label.weight": lambda t: t[:, rows],
            "final.adaln.weight": lambda t: t[pairs][:, rows] * inputs,
            "final.adaln.bias": lambda t: t[pairs],
            "final.linear.weight": lambda t: t[:, rows] * inputs,
            "final.linear.bias": lambda t: t,
        }
        return {name: rules[name](tensor).contiguous() for name, tensor in shell.items()}
