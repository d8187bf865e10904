"""FRONT (arXiv 2603.07523): low frequencies of a trained model's weights make a model of any size, without training.

The weights of one kind, stacked over layers, are a function of layer, row and column. Their discrete cosine transform
along an axis says how that function varies; the learngene is the low-frequency part of it. A target has as many
coefficients along each axis as its own size needs: high frequencies are cut off where it is smaller, and zeros are
appended where it is larger. The inverse transform gives its weights; there is no stage 1 and no stage 2.

*Choices*, since only the paper's summary is public: depth, rows and columns are all transformed, q, k and v and the six
parts of the modulation each by themselves, embedders and the final layer along their width as well. Rows and layers
keep their values when an axis grows, and columns the variance of their sum over inputs. Units of a network have no
order by nature, so dropping frequencies (`keep` below 1) loses much, which training has to bring back.

Shapes: d1 entries of an axis in the parent, d2 in the target, K <= d1 frequencies that are kept.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fine_dist.methods.axes import axes_of
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import FrontConfig
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT


class Front(Method[FrontConfig]):
    """A model of any depth and width from low frequencies of a trained one."""

    Config: ClassVar[type[MethodConfig]] = FrontConfig
    label: ClassVar[str] = "FRONT"
    paper: ClassVar[str] = "FRONT, arXiv 2603.07523"
    summary: ClassVar[str] = "low frequencies of a trained model's weights, at any depth and width"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset({"depth", "width"}))

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        model = DiT(target, generator=generator)
        weights, depth = source.state_dict(), source.arch.num_layers
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if not name.startswith("blocks."):
                state[name] = self.resized(name, weights[name], tuple(tensor.shape))
        for leaf in [name.removeprefix("blocks.0.") for name in model.state_dict() if name.startswith("blocks.0.")]:
            stack = torch.stack([weights[f"blocks.{layer}.{leaf}"] for layer in range(depth)])
            layers = resize(stack, 0, 1, target.num_layers, self.config.keep)
            shape = tuple(model.get_parameter(f"blocks.0.{leaf}").shape)
            for layer, tensor in enumerate(layers):
                state[f"blocks.{layer}.{leaf}"] = self.resized(f"blocks.{layer}.{leaf}", tensor, shape)
        model.load_state_dict(state)
        return Descent(model)

    def resized(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a DiT resampled to `shape` along every axis that depends on the width."""
        for dim, axis in enumerate(axes_of(name)):
            if axis is not None:
                grown = resize(tensor, dim, axis.groups, shape[dim] // axis.groups, self.config.keep)
                # inputs are summed, so their weights keep the variance of the sum and not their values
                tensor = grown * math.sqrt(tensor.shape[dim] / shape[dim]) if dim == 1 else grown
        return tensor


def cosines(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix [size, size], float64: frequencies by entries."""
    k, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    table = torch.cos(math.pi * k * (2 * i + 1) / (2 * size)) * math.sqrt(2 / size)
    table[0] *= math.sqrt(0.5)
    return table


def resize(tensor: Tensor, dim: int, groups: int, size: int, keep: float) -> Tensor:
    """Resample a dimension of `groups` chunks of d1 entries to chunks of `size` entries, from its lowest frequencies.

    Args:
        tensor: Any tensor.
        dim: The dimension.
        groups: Number of chunks, each resampled separately.
        size: Entries d2 of a chunk of the result.
        keep: Fraction of the frequencies that are kept; at least one is.
    """
    parts = tensor.double().movedim(dim, -1).unflatten(-1, (groups, -1))  #                            [..., g, d1]
    old = parts.shape[-1]
    num_kept = min(max(1, round(keep * old)), size)
    # A DCT by a matrix product: an axis is resized once, and torch has no fast transform of this kind.
    spectrum = parts @ cosines(old)[:num_kept].T  #                                                         [..., g, K]
    # The factor preserves values instead of norms: orthonormal transforms of two sizes would change a constant.
    values = spectrum @ cosines(size)[:num_kept] * math.sqrt(size / old)  #                          [..., g, d2]
    resampled: Tensor = values.flatten(-2).movedim(-1, dim).to(tensor.dtype).contiguous()
    return resampled
