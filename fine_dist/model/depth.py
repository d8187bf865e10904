"""Vectors of layers transferred to another depth, such as a target's sigma (FINE, arXiv 2409.19289).

Shapes: L layers of the learngene, N layers of the target, R components, m out features.

The paper has `linear`, `random` and `identical`, and observes that a small model's layers align with segments of a
large one. `segment` and `aligned` are this project's; they also scale the *residual branches*. A target of fewer layers
has to move its tokens as far as the learngene does, so a layer that replaces a segment must take a longer step.

`segment`: a layer is the mean of its segment and takes a step L/N times as long. In the view of differential equations,
depth is time, sigma a function of time, the mean its projection onto functions that are constant on N equal pieces, and
a layer one Euler step. It suits layers that change slowly over depth, such as those of a jointly condensed learngene.

`aligned`: a layer is *one* layer of the learngene, the nearest in relative depth. It suits learngenes whose neighboring
layers are unrelated (factors decomposed from an ancestor), where the mean of two layers is meaningless.

`nearest`: the layers of `aligned` with unscaled residual branches. It suits learngenes whose stage 1 also trained these
depths (`method.depths`), so that the layers of a shallower model already take steps of the right length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

RESIDUAL = ("o", "out")
"""Matrices that end a residual branch."""


def relative_depth(table: Tensor, num_layers: int) -> Tensor:
    """Any per-layer vectors [L, K] interpolated linearly over relative depth, first to first and last to last: [N, K].

    A single layer takes the middle.
    """
    at = _positions(len(table), num_layers)
    below = at.floor().long().clamp(max=len(table) - 1)
    above = (below + 1).clamp(max=len(table) - 1)
    weight = (at - below)[:, None].to(table)
    return table[below] * (1 - weight) + table[above] * weight


def _positions(source: int, num_layers: int) -> Tensor:
    """Positions of the target's layers among `source` layers, [N]: ends on ends, a single layer in the middle."""
    if num_layers == 1:
        return torch.tensor([(source - 1) / 2])
    return torch.linspace(0, source - 1, num_layers)


def linear(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """Linear interpolation over relative depth."""
    return relative_depth(table, num_layers)


def identical(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """The mean over layers, repeated in every layer."""
    return table.mean(0, keepdim=True).repeat(num_layers, 1)


def random(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """Gaussian with the mean and standard deviation of this matrix's table."""
    noise = torch.randn(num_layers, table.shape[1], generator=generator).to(table)
    return table.mean() + table.std() * noise


def segment(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """The mean over the segment of depth that the target's layer covers."""
    return segment_mean(table, num_layers)


def segment_mean(table: Tensor, num_layers: int) -> Tensor:
    """Per-layer vectors [L, K], a function constant on L equal pieces of depth, averaged over N equal pieces: [N, K].

    That is the least-squares fit of such a function by one that is constant on the N pieces.
    """
    source = len(table)
    # A matrix [N, L] of overlaps: each row adds up to one, so that a constant table stays as it is.
    lower = torch.arange(num_layers)[:, None] * source / num_layers  # pieces in units of 1/L, [N, 1]
    upper = lower + source / num_layers
    layer = torch.arange(source)[None]
    overlap = (torch.minimum(upper, layer + 1.0) - torch.maximum(lower, layer * 1.0)).clamp(min=0)  #           [N, L]
    return (overlap * num_layers / source).to(table) @ table


def longer_steps(source: int, num_layers: int) -> Tensor:
    """Scale of the residual branches of each segment layer, [N]: L/N, so that N steps go as far as L steps did."""
    return torch.full((num_layers,), source / num_layers)


def aligned(table: Tensor, num_layers: int, generator: Generator) -> Tensor:
    """The nearest layer in relative depth."""
    return nearest(table, num_layers)


def nearest(table: Tensor, num_layers: int) -> Tensor:
    """Per-layer vectors [L, K] of the nearest layer in relative depth: [N, K]."""
    return table[nearest_layers(len(table), num_layers)]


def nearest_layers(source: int, num_layers: int) -> Tensor:
    """Which of `source` layers each layer of the target takes, int64 [N], never falling."""
    return _positions(source, num_layers).round().long()


def unscaled(source: int, num_layers: int) -> Tensor:
    """Scale of unchanged residual branches: ones [N]."""
    return torch.ones(num_layers)


def segment_share(source: int, num_layers: int) -> Tensor:
    """Scale of the residual branches of each aligned layer, [N].

    A layer that is repeated k times takes k steps of 1/k each, so the sum of its steps stays the same. A layer that
    replaces a segment of k layers moves sqrt(k) times as far, as a sum of k unrelated steps would; k times as far
    overshoots.
    """
    chosen = nearest_layers(source, num_layers)
    # A source layer is shared equally by all target layers that are nearest to it; its shares add up to one.
    distance = (torch.arange(source)[None] - chosen[:, None]).abs()  #                                          [N, L]
    closest = (distance == distance.min(0).values).float()
    share = (closest / closest.sum(0)).sum(1)  # source layers that each target layer replaces; below 1: repeated
    return torch.where(share > 1, share.sqrt(), share)


@dataclass(frozen=True)
class Initial:
    """A rule for the vectors of a target: `initial(sigma [L, R], N, generator) -> [N, R]`.

    Attributes:
        sigma: The rule for sigma.
        bias: The rule for biases, `(table [L, m], N) -> [N, m]`.
        share: Scale of the residual branches, `(L, N) -> [N]`.
    """

    sigma: Callable[[Tensor, int, Generator], Tensor]
    bias: Callable[[Tensor, int], Tensor] = relative_depth
    share: Callable[[int, int], Tensor] = unscaled

    def __call__(self, table: Tensor, num_layers: int, generator: Generator) -> Tensor:
        return self.sigma(table, num_layers, generator)

    def layers(
        self, matrix: str, sigma: Tensor, bias: Tensor, num_layers: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """A matrix's sigma [N, R] and biases [N, m] for the target, from the learngene's [L, R] and [L, m]."""
        values, biases = self(sigma, num_layers, generator), self.bias(bias, num_layers)
        # Only the matrices that write into the residual stream: scaling them scales the layer's step and nothing else.
        if matrix in RESIDUAL:
            share = self.share(len(sigma), num_layers)[:, None].to(sigma)
            values, biases = values * share, biases * share
        return values, biases


INITIALS: dict[str, Initial] = {
    "linear": Initial(linear),
    "random": Initial(random),
    "identical": Initial(identical),
    "segment": Initial(segment, segment_mean, longer_steps),
    "aligned": Initial(aligned, nearest, segment_share),
    "nearest": Initial(aligned, nearest),
}
