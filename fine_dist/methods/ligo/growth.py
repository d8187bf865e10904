"""A larger DiT as a linear function of a smaller one's frozen weights: what LiGO (arXiv 2303.00980) trains.

    W(l) = B_rows (sum_j w[l, j] W_j) B_columns^T,    B = [I; M]:    depth first, then width

A width operator belongs to a space (`methods.axes`), so that rows that write to a space and columns that read from it
grow in the same way: this ties operators over matrices and layers. Depth operators belong to a matrix type.

Shapes: D1, L1 the source's width and layers, D2, L2 the target's; m x n a matrix, g chunks of an axis.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.methods.axes import MATRIX_AXES, SHELL_AXES, SPACES, Axis, size_of
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.dit import Condition, DiT
from fine_dist.model.roles import Role


class Widen(nn.Module):
    """A width operator `[I; M]` [d2, d1]: the first d1 units are copied, M [d2 - d1, d1] mixes them into new units.

    M starts with uniform random rows of sum one. M is None if d1 equals d2.
    """

    roles: ClassVar[dict[str, Role]] = {"M": "scaler"}

    def __init__(self, d1: int, d2: int, generator: torch.Generator | None = None):
        super().__init__()
        new = torch.rand(d2 - d1, d1, generator=generator)
        self.M = nn.Parameter(new / new.sum(1, keepdim=True)) if d2 > d1 else None

    def forward(self, tensor: Tensor, dim: int, groups: int) -> Tensor:
        """Grow a dimension of `groups` chunks of d1 entries to chunks of d2 entries."""
        if self.M is None:
            return tensor
        parts = tensor.movedim(dim, -1).unflatten(-1, (groups, -1))  #                                 [..., g, d1]
        # `[I; M]` is never formed: the first d1 entries are copied, and only the new entries are computed.
        return torch.cat([parts, parts @ self.M.T], -1).flatten(-2).movedim(-1, dim)

    def multiply_adds(self, others: int, groups: int) -> int:
        """Multiply-adds of growing a dimension; `others` is the product of the tensor's other dimensions."""
        return 0 if self.M is None else others * groups * self.M.numel()


class SourceWeights(nn.Module):
    """A matrix's weights [L1, m, n] and biases [L1, m] in the source's layers, frozen, and its depth operator [L2, L1].

    Outside the blocks there is one layer and no depth operator. ZeRO-3 gathers the weights when this module is called.
    """

    roles: ClassVar[dict[str, Role]] = {"weight": "gene", "bias": "gene", "depth": "scaler"}

    def __init__(self, weight: tuple[int, ...], bias: bool, operator: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(weight), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(weight[:2]), requires_grad=False) if bias else None
        self.depth = None if operator is None else nn.Parameter(operator)

    def forward(self, layer: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight [m, n] and bias [m] mixed for the target's layer, an int64 scalar."""
        if self.depth is None:
            return self.weight[0], None if self.bias is None else self.bias[0]
        # `index_select` with a tensor, because an int index would be compiled as a constant, separately for each layer.
        mix = self.depth.index_select(0, layer.view(1))[0]  #                                                  [L1]
        return torch.tensordot(mix, self.weight, 1), None if self.bias is None else torch.tensordot(mix, self.bias, 1)


def stacked(num_layers: int, source: int, noise: float, generator: torch.Generator | None) -> Tensor:
    """The depth operator at its start, [L2, L1]: stacking (StackBERT: l mod L1) plus U(0, noise), each
    row divided by its sum, as the authors do. Main entries are then about 0.97, 0.93, 0.85 for 3, 6, 12 layers."""
    stack = torch.eye(source)[torch.arange(num_layers) % source]
    operator = stack + noise * torch.rand(num_layers, source, generator=generator)
    return operator / operator.sum(1, keepdim=True)


class Grown(nn.Module):
    """A linear map whose weight and bias are grown at every call. Its tensors belong to the model's root."""

    layer: Tensor

    def __init__(self, source: SourceWeights, layer: int, axes: tuple[Axis | None, Axis | None], widen: Any):
        super().__init__()
        # A tensor, not an int: a compiled block takes it as an input, and an int would compile every layer again.
        self.register_buffer("layer", torch.tensor(layer), persistent=False)
        self._axes = axes
        # In tuples, which register nothing: operators and source weights belong to the root, once.
        self._source, self._widen = (source,), (widen,)

    def grow(self) -> tuple[Tensor, Tensor | None]:
        """Weight [m2, n2] and bias [m2], dense."""
        weight, bias = self._source[0](self.layer)
        for dim, axis in enumerate(self._axes):
            if axis is not None:
                weight = self._widen[0][axis.space](weight, dim, axis.groups)
        rows = self._axes[0]
        if bias is not None and rows is not None:
            bias = self._widen[0][rows.space](bias, 0, rows.groups)
        return weight, bias

    @property
    def weight(self) -> Tensor:
        return self.grow()[0]

    @property
    def bias(self) -> Tensor | None:
        return self.grow()[1]

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return F.linear(x, *self.grow())

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of growing the weight and a product of `rows` rows; `backward` adds the backward pass."""
        source: SourceWeights = self._source[0]
        _, m1, n1 = source.weight.shape
        mix = source.weight.numel() if source.depth is not None else 0
        m2, widen = m1, 0
        if (axis := self._axes[0]) is not None:
            operator = self._widen[0][axis.space]
            widen += operator.multiply_adds(n1, axis.groups)
            m2 += 0 if operator.M is None else axis.groups * operator.M.shape[0]
        n2 = n1
        if (axis := self._axes[1]) is not None:
            operator = self._widen[0][axis.space]
            widen += operator.multiply_adds(m2, axis.groups)
            n2 += 0 if operator.M is None else axis.groups * operator.M.shape[0]
        # backward: through the product to x and to W, through W to both factors of widening and to the mixing weights
        return mix + widen + rows * m2 * n2 + backward * (2 * rows * m2 * n2 + 2 * widen + mix)


class GrownEmbedding(Grown):
    """The label embedder, whose rows are classes and do not grow."""

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return F.embedding(x, self.weight)


class GrownDiT(DiT):
    """A DiT of architecture `arch` whose weights are all grown from a DiT of `width` and `layers`.

    `noise` is the width of the uniform noise in the initial depth operators.
    """

    def __init__(
        self, arch: Arch, width: int, layers: int, noise: float = 0.03, generator: torch.Generator | None = None
    ):
        small = arch.model_copy(update={"hidden_size": width, "num_layers": layers})
        widen = nn.ModuleDict(
            {space: Widen(size_of(small, space), size_of(arch, space), generator) for space in SPACES}
        )
        sources = nn.ModuleDict()
        for matrix in MATRICES:
            operator = stacked(arch.num_layers, layers, noise, generator)
            sources[matrix] = SourceWeights((layers, *small.matrix(matrix)), True, operator)
        shapes = small.shell_shapes()
        for name in SHELL_AXES:
            sources[key(name)] = SourceWeights((1, *shapes[f"{name}.weight"]), f"{name}.bias" in shapes)

        def grown(matrix: str, layer: int) -> nn.Module:
            return Grown(sources[matrix], layer, MATRIX_AXES[matrix], widen)  # type: ignore[arg-type]

        super().__init__(arch, grown, generator)
        for name, axes in SHELL_AXES.items():
            kind = GrownEmbedding if name == "label" else Grown
            self.set_submodule(name, kind(sources[key(name)], 0, axes, widen))  # type: ignore[arg-type]
        self.sources, self.widen = sources, widen

    @torch.no_grad()
    def take(self, source: DiT) -> None:
        """Grow from this model's weights."""
        state = source.state_dict()
        part: Any
        for name, part in self.sources.items():
            prefixes = [f"blocks.{i}.{name}" for i in range(len(source.blocks))]
            if name not in MATRICES:
                prefixes = [next(shell for shell in SHELL_AXES if key(shell) == name)]
            part.weight.copy_(torch.stack([state[f"{prefix}.weight"] for prefix in prefixes]))
            if part.bias is not None:
                part.bias.copy_(torch.stack([state[f"{prefix}.bias"] for prefix in prefixes]))

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """The state dict of the ordinary dense DiT that computes the same function."""
        state: dict[str, Tensor] = {}
        for name, module in self.named_modules():
            if isinstance(module, Grown):
                weight, bias = module.grow()
                state[f"{name}.weight"] = weight.clone()
                if bias is not None:
                    state[f"{name}.bias"] = bias.clone()
        state.setdefault("label.weight", self.label.weight.detach().clone())  # a target's own labels are not grown
        return state


def key(name: str) -> str:
    """A module's name as a key of a `ModuleDict`."""
    return name.replace(".", "_")
