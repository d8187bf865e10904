"""DiffFit (Xie et al., arXiv 2304.06648): a new domain by training biases, labels and a scale on residual branches.

The trained parameters are the biases (except the time embedder's), the label embedder, and a scale gamma [D], initially
one, on the attention and MLP branches of the first half of the blocks. Afterwards gamma is folded into the weights and
biases of `o` and `out`. The paper's learning rate is ten times that of pre-training (optim.lr 1e-3).

Counts: 15 D L biases of blocks, 3 D + p^2 C_out outside them, (C + 1) D labels, and 2 D gammas in each scaled block.
For DiT-XL/2 that is 0.08% of the model before labels, and 0.11% with the 201 labels of a set of 200 classes; the paper
states 0.12%.

A target may have another resolution than its parent, such as 512 pixels from 256: the same parameters train on the
larger latents, and positions of the new grid are rescaled to the range of the old grid (half the index for twice the
side), so that the frozen weights see positions that they were trained on.

*Choice*: there is no public code for DiT; other ports train the time embedder's biases too, or scale attention alone.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import DiffFitConfig
from fine_dist.model.arch import Arch, sides
from fine_dist.model.depth import RESIDUAL
from fine_dist.model.dit import Condition, Dense, DiT
from fine_dist.model.roles import Role, train_only


class DiffFit(Method[DiffFitConfig]):
    """Same size, new domain."""

    Config: ClassVar[type[MethodConfig]] = DiffFitConfig
    label: ClassVar[str] = "DiffFit"
    paper: ClassVar[str] = "DiffFit, arXiv 2304.06648"
    summary: ClassVar[str] = "transfer: biases, labels and scales of branches train"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset({"resolution"}))

    def shape_of(self, target: Arch, parent: Arch) -> Arch:
        if target.input_size == parent.input_size:
            return target.model_copy(update={"position_grid": parent.position_grid})
        # A parent may itself have been adapted; then its weights were trained on the grid in its `position_grid`.
        trained = parent.position_grid or sides(*parent.grid)
        return target.model_copy(update={"position_grid": trained})

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"scaled": ("first_half", "all")}

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        model = self.module(target, {})
        model.load_state_dict({**model.state_dict(), **needed(parent).module.state_dict()})
        train_only(model, "bias", "scaler")
        # parameters outside the blocks all have the role `shell`, so those that train are listed here
        for parameter in (model.patch.bias, model.final.adaln.bias, model.final.linear.bias, model.label.weight):
            parameter.requires_grad_(True)
        return Descent(model, "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> DiT:
        last = (arch.num_layers + 1) // 2 if self.config.scaled == "first_half" else arch.num_layers

        def matrix(name: str, layer: int) -> nn.Module:
            kind = ScaledDense if name in RESIDUAL and layer < last else Dense
            m, n = arch.matrix(name)
            return kind(n, m)

        return DiT(arch, matrix)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for name, module in model.named_modules():
            if isinstance(module, ScaledDense):
                state.pop(f"{name}.gamma")
                for part, tensor in zip(("weight", "bias"), module.folded()):
                    state[f"{name}.{part}"] = tensor.detach()
        return state


class ScaledDense(Dense):
    """`gamma * (x W^T + b)`, gamma [m] initially one.

    While gradients are recorded, gamma multiplies the product, so that no gradient of W is formed. Without gradients
    gamma is folded into W and b first, so that evaluation has the bits of the merged model.
    """

    roles: ClassVar[dict[str, Role]] = {**Dense.roles, "gamma": "scaler"}

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.gamma = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        if torch.is_grad_enabled():
            y = F.linear(x, self.weight, self.bias)
            return y * self.gamma.to(y.dtype)
        return F.linear(x, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] of the ordinary matrix that computes the same function."""
        return self.gamma[:, None] * self.weight, self.gamma * self.bias

    def saved_for_backward(self, rows: int) -> int:
        """Numbers saved for the backward pass in addition to a dense product's: the unscaled result."""
        return rows * self.out_features
