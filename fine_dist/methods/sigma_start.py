"""Where a target's sigma starts before it is trained (FINE, arXiv 2409.19289, table of sigma starts).

Shapes: L layers of the learngene, N layers of the target, R components. A start maps a kind's table [L, R] to [N, R].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

Start = Callable[["Tensor", int, "Generator"], "Tensor"]


def relative_depth(table: Tensor, num_layers: int) -> Tensor:
    """Any per-layer vectors [L, K] interpolated linearly over relative depth, first to first and last to last: [N, K].

    A single layer takes the middle.
    """
    import torch

    source = len(table)
    if num_layers == 1:
        at = torch.tensor([(source - 1) / 2])
    else:
        at = torch.linspace(0, source - 1, num_layers)
    below = at.floor().long().clamp(max=source - 1)
    above = (below + 1).clamp(max=source - 1)
    weight = (at - below)[:, None].to(table)
    return table[below] * (1 - weight) + table[above] * weight


def linear(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """Interpolated over relative depth."""
    return relative_depth(table, num_layers)


def identical(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """The mean over layers, in every layer."""
    return table.mean(0, keepdim=True).repeat(num_layers, 1)


def random(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """Gaussian with the mean and standard deviation of this kind's table."""
    import torch

    noise = torch.randn(num_layers, table.shape[1], generator=generator).to(table)
    return table.mean() + table.std() * noise


STARTS: dict[str, Start] = {"linear": linear, "random": random, "identical": identical}
