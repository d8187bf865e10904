"""Components with a gate that depends on each sample's label (KIND, arXiv 2408.07337).

`y = ((x V) * (sigma * g(label))) U^T + bias`. The components of a layer are learngenes, which every sample uses, and
tailors in groups, which only samples of the group's classes use; the null label uses learngenes alone. The factored
path gates each sample separately; a masked component contributes zero and gets no gradient.

Shapes: B batch, m out features, n in features, G learngene components, R tailors of all groups, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.model.arch import Arch
from fine_dist.model.dit import Condition, Dense, DiT
from fine_dist.model.factors import factored_product, sigma_std, spread_columns
from fine_dist.model.roles import Role, of_role

GATED = ("qkv", "o", "in", "out")
"""Matrices with gated components; adaln is an ordinary matrix."""


class Gate(nn.Module):
    """`y [B] -> g [B, R]`: 1 for the tailors that a sample uses, 0 for the others.

    Attributes:
        group: Group of each label, fp32 [C + 1] with integer values (tensors of artifacts are floating-point); -1 uses
            no tailors, as the null label does.
        opens: Tailors of each group, fp32 [groups + 1, R]; its last row, which -1 selects, is zero.
    """

    group: Tensor
    opens: Tensor

    def __init__(self, group: Tensor, opens: Tensor):
        super().__init__()
        self.register_buffer("group", group.float())
        self.register_buffer("opens", opens)

    def forward(self, y: Tensor) -> Tensor:
        return self.opens[self.group[y].long()]

    @property
    def table(self) -> list[int]:
        """The group of each label."""
        return [int(group) for group in self.group.tolist()]


class GatedLinear(nn.Module):
    """One layer's matrix: learngenes U [m, G], V [n, G], sigma [G], tailors of the same form, and a bias [m]."""

    roles: ClassVar[dict[str, Role]] = {
        "U": "gene",
        "V": "gene",
        "sigma": "gene",
        "tailor_U": "tailor",
        "tailor_V": "tailor",
        "tailor_sigma": "tailor",
        "bias": "bias",
    }
    multiplied: ClassVar[tuple[str, ...]] = ("U", "V", "tailor_U", "tailor_V", "bias")

    def __init__(self, gate: Gate, m: int, n: int, learngenes: int, active: int, generator: torch.Generator | None):
        super().__init__()
        self._gate = (gate,)
        tailors = gate.opens.shape[1]
        u, v = (spread_columns(side, learngenes + tailors, generator) for side in (m, n))
        std = sigma_std(m, n, learngenes + active)  # the active components give W the variance of Xavier's
        sigma = torch.randn(learngenes + tailors, generator=generator) * std
        self.U, self.tailor_U = (nn.Parameter(part.clone()) for part in u.split([learngenes, tailors], 1))
        self.V, self.tailor_V = (nn.Parameter(part.clone()) for part in v.split([learngenes, tailors], 1))
        self.sigma, self.tailor_sigma = (nn.Parameter(part.clone()) for part in sigma.split([learngenes, tailors]))
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        # Two products: learngenes have one sigma for all samples, tailors a gated one for each sample.
        y = factored_product(x, self.U, self.V, self.sigma, self.bias)  #                                   [B, T, m]
        if not self.tailor_sigma.numel():
            return y
        gate = self._gate[0](condition.y)[:, None]  #                                                       [B, 1, R]
        return y + factored_product(x, self.tailor_U, self.tailor_V, self.tailor_sigma * gate, None)

    def dense(self, group: int = -1) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] for samples of a group's classes; -1: for samples without tailors."""
        scaled = self.tailor_U * (self.tailor_sigma * self._gate[0].opens[group])
        return (self.U * self.sigma) @ self.V.T + scaled @ self.tailor_V.T, self.bias

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of a product of `rows` rows through all components; `backward` adds the backward pass."""
        sides = self.U.shape[0] + self.V.shape[0]
        total = 0
        for u, count in ((self.U, len(self.sigma)), (self.tailor_U, len(self.tailor_sigma))):
            total += rows * count * sides * (1 + backward + (backward and u.requires_grad))
        return total

    def saved_for_backward(self, rows: int) -> int:
        """Numbers saved for the backward pass in addition to a dense product's: the thin products, twice."""
        return 2 * rows * (len(self.sigma) + len(self.tailor_sigma))


class GatedDiT(DiT):
    """A DiT whose token matrices have gated components.

    Args:
        arch: Architecture.
        learngenes: G, the number of learngene components of every matrix.
        tailors: Number of tailors of each group.
        groups: Number of groups.
        table: Group of each label, [C + 1]; -1 for none.
        generator: Random numbers of the initialization.
    """

    def __init__(
        self,
        arch: Arch,
        learngenes: int,
        tailors: int,
        groups: int,
        table: Sequence[int],
        generator: torch.Generator | None = None,
    ):
        gate = Gate(torch.tensor(table), opens(groups, tailors))

        def matrix_of(matrix: str, layer: int) -> nn.Module:
            m, n = arch.matrix(matrix)
            return GatedLinear(gate, m, n, learngenes, tailors, generator) if matrix in GATED else Dense(n, m)

        super().__init__(arch, matrix_of, generator)
        self.gate = gate

    def gated(self) -> list[tuple[int, str, GatedLinear]]:
        """(layer, matrix, module) of all gated matrices."""
        matrices: list[tuple[int, str, Any]] = []
        for layer, block in enumerate(self.blocks):
            matrices += [(layer, matrix, block.get_submodule(matrix)) for matrix in GATED]
        return matrices

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(learngenes, tailors of each group, groups)."""
        groups = len(self.gate.opens) - 1
        return len(self.gated()[0][2].sigma), self.gate.opens.shape[1] // max(groups, 1), groups

    @torch.no_grad()
    def keep(self, groups: Sequence[int]) -> GatedDiT:
        """The same model with the tailors of some groups; classes of the others then use learngenes alone."""
        learngenes, tailors, _ = self.sizes
        table = [groups.index(group) if group in groups else -1 for group in self.gate.table]
        # The tailors of a group are consecutive columns.
        columns = torch.cat([torch.arange(tailors) + group * tailors for group in groups] or [torch.zeros(0).long()])
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("gate.")}
        for layer, matrix, _ in self.gated():
            for name, dim in (("tailor_U", 1), ("tailor_V", 1), ("tailor_sigma", 0)):
                key = f"blocks.{layer}.{matrix}.{name}"
                state[key] = state[key].index_select(dim, columns.to(state[key].device))
        model = GatedDiT(self.arch, learngenes, tailors, len(groups), table)
        model.load_state_dict({**state, **{f"gate.{k}": v for k, v in model.gate.state_dict().items()}})
        return model

    @torch.no_grad()
    def merge(self, group: int = -1) -> dict[str, Tensor]:
        """The state dict of an ordinary DiT that computes the same function for the classes of one group.

        Args:
            group: Number of the group. -1: learngenes alone, the function of the null label.
        """
        state = {name: p.clone() for name, p in of_role(self, "shell", "bias", "weight").items()}
        for layer, matrix, module in self.gated():
            state[f"blocks.{layer}.{matrix}.weight"] = module.dense(group)[0].detach().clone()
        return state

    def sigma_table(self, matrix: str) -> Tensor:
        """A matrix's sigma over depth, learngenes first, [L, G + R], detached, on the CPU."""
        rows = [torch.cat([g.sigma, g.tailor_sigma]) for _, name, g in self.gated() if name == matrix]
        return torch.stack(rows).detach().float().cpu()


def opens(groups: int, tailors: int) -> Tensor:
    """Mask of the tailors of each group, [groups + 1, groups x tailors]; the last row is zero."""
    table = torch.zeros(groups + 1, groups * tailors)
    table[:groups] = torch.eye(groups).repeat_interleave(tailors, 1)
    return table


def neighbours(num_classes: int, groups: int) -> list[int]:
    """The group of each label [C + 1] if consecutive classes form near-equal groups; -1 for the null label."""
    # Integer division spreads the remainder over the groups.
    return [label * groups // num_classes for label in range(num_classes)] + [-1]
