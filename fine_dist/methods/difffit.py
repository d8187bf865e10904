"""DiffFit (Xie et al., arXiv 2304.06648): a new domain by training biases, labels and a scale on residual branches.

Everything is frozen but the biases (the time embedder's excepted), the label embedder, and gamma [D], from one, on the
attention and MLP branches of the first half of the blocks. Gamma then folds into `o` and `out`, weights and biases.
The paper's learning rate is ten times pre-training's (optim.lr 1e-3).

Counts: 15 D L biases of blocks, 3 D + p^2 C_out outside them, (C + 1) D labels, 2 D gammas a scaled block. For
DiT-XL/2 that is 0.08% of the model before labels, and 0.11% with the 201 labels of a set of 200 classes; the paper
says 0.12%.

*Choice*: there is no public code on DiT; other ports train the time embedder's biases too, or scale attention alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.model.depth import RESIDUAL

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fine_dist.model.arch import Arch
    from fine_dist.model.dit import DiT


class DiffFitConfig(MethodConfig):
    """DiffFit: biases, labels and scales of residual branches."""

    name: Literal["difffit"] = "difffit"
    """DiffFit."""
    scaled: Literal["first_half", "all"] = "first_half"
    """Blocks whose branches have a scale: the first 14 of 28, or all."""


class DiffFit(Method[DiffFitConfig]):
    """Same size, new domain."""

    Config: ClassVar[type[MethodConfig]] = DiffFitConfig
    label: ClassVar[str] = "DiffFit"
    paper: ClassVar[str] = "DiffFit, arXiv 2304.06648"
    summary: ClassVar[str] = "transfer: biases, labels and scales of branches train"

    @property
    def traits(self) -> Traits:
        return Traits(parents=("model",), varies=frozenset())

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"scaled": ("first_half", "all")}

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        from fine_dist.model.roles import train_only

        model = self.module(target, {})
        model.load_state_dict({**model.state_dict(), **needed(parent).module.state_dict()})
        train_only(model, "bias", "scaler")
        # outside the blocks nothing is declared: what trains there is named here, module by module
        for own in (model.patch.bias, model.final.adaln.bias, model.final.linear.bias, model.label.weight):
            own.requires_grad_(True)
        return Descent(model, "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> DiT:
        from fine_dist.model.dit import Dense, DiT
        from fine_dist.model.scaled import ScaledDense

        last = (arch.num_layers + 1) // 2 if self.config.scaled == "first_half" else arch.num_layers

        def matrix(name: str, layer: int) -> nn.Module:
            kind = ScaledDense if name in RESIDUAL and layer < last else Dense
            m, n = arch.matrix(name)
            return kind(n, m)

        return DiT(arch, matrix)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        from fine_dist.model.scaled import ScaledDense

        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for name, module in model.named_modules():
            if isinstance(module, ScaledDense):
                state.pop(f"{name}.gamma")
                for part, tensor in zip(("weight", "bias"), module.folded()):
                    state[f"{name}.{part}"] = tensor.detach()
        return state
