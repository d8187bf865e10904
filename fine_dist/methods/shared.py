"""A DiT whose layers share whole matrices: one for several layers, or a line through two for all of them.

The genes are registered once, at the root. A layer holds its genes in a tuple, which registers nothing, and *calls*
them, because ZeRO-3 gathers the parameters of a module when it is called. Every such matrix has a dense form (`dense`).

Shapes: m out features, n in features, L layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.methods.base import Condensation, M, Method, Traits, Weights
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.dit import Condition, DiT, LinearFactory
from fine_dist.model.roles import of_role


class GeneLinear(nn.Module):
    """The matrix of one layer without its own parameters: it calls shared genes with the position of the layer."""

    position: Tensor | None

    def __init__(self, genes: nn.Module, position: float | None = None):
        super().__init__()
        # In a tuple: an attribute would register the genes again in every layer.
        self._genes = (genes,)
        # A tensor, not a float: a compiled block takes it as an input, and a float would compile every layer again.
        self.register_buffer("position", None if position is None else torch.tensor(position), persistent=False)

    @property
    def genes(self) -> Any:
        return self._genes[0]

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        y: Tensor = self.genes(x) if self.position is None else self.genes(x, self.position)
        return y

    def dense(self) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] that this layer multiplies by."""
        dense: tuple[Tensor, Tensor] = self.genes.dense() if self.position is None else self.genes.dense(self.position)
        return dense

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        count: int = self.genes.multiply_adds(rows, backward=backward)
        return count

    def saved_for_backward(self, rows: int) -> int:
        count = getattr(self.genes, "saved_for_backward", None)
        return count(rows) if count else 0


class SharedBlocks(Method[M]):
    """Base class of TLEG and SWS: genes that layers share, distilled from an ancestor's output alone."""

    @property
    def traits(self) -> Traits:
        return Traits(
            parents=("learngene",),
            varies=frozenset({"depth"}),
            condenses=True,
            ancestor="must",
            loss=Weights(diffusion=0.0, output=1.0),
        )

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        return Condensation(self.blueprint(arch, generator))

    @abstractmethod
    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> SharedDiT:
        """The model that stage 1 trains."""

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        return dense_state(model)


class SharedDiT(DiT):
    """A DiT whose root owns genes that the matrices of its blocks use.

    Args:
        arch: Architecture.
        genes: Genes by matrix; in the state dict they are `genes.MATRIX...`.
        linear: Makes a layer's matrix from them.
        generator: Random numbers of the initialization.
    """

    def __init__(
        self, arch: Arch, genes: dict[str, nn.Module], linear: LinearFactory, generator: torch.Generator | None = None
    ):
        super().__init__(arch, linear, generator)
        self.genes = nn.ModuleDict(genes)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the ordinary dense DiT that computes the same function, from the dense form of each matrix."""
    blocks: Any = model.blocks
    return expanded(model, len(blocks), lambda matrix, layer: blocks[layer].get_submodule(matrix).dense())


@torch.no_grad()
def expanded(
    model: nn.Module, num_layers: int, dense: Callable[[str, int], tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The state dict of a dense DiT with the model's shell and given block matrices.

    Args:
        model: Source of the shell (embedders and final layer).
        num_layers: Number of blocks.
        dense: (matrix, layer) -> weight [m, n] and bias [m].
    """
    state = {name: p.clone() for name, p in of_role(model, "shell").items()}
    for layer in range(num_layers):
        for matrix in MATRICES:
            weight, bias = dense(matrix, layer)
            state[f"blocks.{layer}.{matrix}.weight"] = weight.detach().clone()
            state[f"blocks.{layer}.{matrix}.bias"] = bias.detach().clone()
    return state
