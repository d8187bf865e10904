"""SVDiff (Han et al., arXiv 2303.11305): a new domain by shifting singular values.

Each of a block's five matrices is decomposed once, W = U diag(S) V^T; delta [min(m, n)] trains, from zero:
`W' = U diag(relu(S + delta)) V^T` (eq. 2). Biases and everything outside the blocks stay frozen.

Counts: 5 D trained numbers in each block, because its five matrices have rank D. U, S and V are saved with delta, so
that a saved target does not depend on the library that computed them.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import SvdiffConfig
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.dit import Condition, DiT
from fine_dist.model.factors import cheaper_path, factored_product, multiply_adds
from fine_dist.model.roles import Role, of_role, train_only


class Svdiff(Method[SvdiffConfig]):
    """Same size, new domain."""

    Config: ClassVar[type[MethodConfig]] = SvdiffConfig
    label: ClassVar[str] = "SVDiff"
    paper: ClassVar[str] = "SVDiff, arXiv 2303.11305"
    summary: ClassVar[str] = "transfer: singular values shift"
    tables_of: ClassVar[str] = "shift of singular values"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset())

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent).module
        model = self.module(target, {})
        model.load_state_dict({**model.state_dict(), **of_role(source, "shell")})
        for spectral, dense in zip(_matrices(model), _matrices(source)):
            spectral.decompose(dense.weight.detach(), dense.bias.detach())  # type: ignore[operator]
        train_only(model, "scaler")
        return Descent(model, "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> DiT:
        return DiT(arch, lambda matrix, layer: SpectralDense(*reversed(arch.matrix(matrix))))

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        state = {name: tensor.clone() for name, tensor in of_role(model, "shell", "bias").items()}
        for name, module in model.named_modules():
            if isinstance(module, SpectralDense):
                state[f"{name}.weight"] = module.compose().detach().clone()
        return state

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        blocks = list(model.blocks)  # type: ignore[arg-type]
        return {
            name: torch.stack([block.get_submodule(name).delta.detach().float().cpu() for block in blocks])
            for name in MATRICES
        }


def _matrices(model: nn.Module) -> list[nn.Module]:
    return [block.get_submodule(matrix) for block in model.blocks for matrix in MATRICES]  # type: ignore[union-attr]


class SpectralDense(nn.Module):
    """`x (U diag(relu(S + delta)) V^T)^T + b`: U [m, r], S [r], V [n, r], b [m] frozen, delta [r] from zero.

    The factors are stored as computed once, so that a different SVD implementation never changes a saved model.
    """

    roles: ClassVar[dict[str, Role]] = {"U": "weight", "S": "weight", "V": "weight", "delta": "scaler", "bias": "bias"}
    multiplied: ClassVar[tuple[str, ...]] = ("U", "V", "bias")

    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    delta: nn.Parameter
    bias: nn.Parameter

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        m, n, r = out_features, in_features, min(out_features, in_features)
        shapes = {"U": (m, r), "S": (r,), "V": (n, r), "bias": (m,), "delta": (r,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=name == "delta"))

    @torch.no_grad()
    def decompose(self, weight: Tensor, bias: Tensor) -> None:
        """Set the factors to the SVD of a weight [m, n], and the bias [m]."""
        # In fp64, so that U diag(S) V^T reproduces the parent's weights up to the rounding of fp32.
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        for parameter, value in ((self.U, u), (self.S, s), (self.V, vt.T), (self.bias, bias)):
            parameter.copy_(value)

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        if self.choose(x.numel() // x.shape[-1], torch.is_grad_enabled()) == "factored":
            return factored_product(x, self.U, self.V, self.spectrum, self.bias)
        return F.linear(x, self.compose(), self.bias)

    @property
    def spectrum(self) -> Tensor:
        """The shifted singular values [r], none below zero."""
        return F.relu(self.S + self.delta)

    def compose(self) -> Tensor:
        """The dense weight [m, n]."""
        return (self.U * self.spectrum) @ self.V.T

    def choose(self, rows: int, backward: bool) -> str:
        """The path with fewer multiply-adds, `composed` or `factored`."""
        return cheaper_path(rows, *self._sides, **self._training, backward=backward)

    @property
    def _sides(self) -> tuple[int, int, int]:
        return self.U.shape[0], self.V.shape[0], self.U.shape[1]

    @property
    def _training(self) -> dict[str, bool]:
        return {"train_factors": self.U.requires_grad, "train_scalers": self.delta.requires_grad}

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of a product of `rows` rows on the cheaper path; `backward` adds the backward pass."""
        path = self.choose(rows, backward)
        return multiply_adds(path, rows, *self._sides, **self._training, backward=backward)

    def saved_for_backward(self, rows: int) -> int:
        """Numbers saved for the backward pass in addition to a dense product's."""
        if self.choose(rows, True) == "composed":
            return self.U.shape[0] * self.V.shape[0]
        return rows * self.U.shape[1]

    def saves_input(self, rows: int) -> bool:
        """Whether the backward pass needs the input."""
        return self.choose(rows, True) == "composed"
