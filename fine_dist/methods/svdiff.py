"""SVDiff (Han et al., arXiv 2303.11305): a new domain by shifting singular values.

Each of a block's five matrices is W = U diag(S) V^T once; what trains is delta [min(m, n)], from zero:
`W' = U diag(relu(S + delta)) V^T` (eq. 2). Biases and everything outside the blocks stay frozen.

Counts: (4 + 1) D a block, for its five matrices have rank D; delta is what a domain adds to its parent's numbers, and
U, S and V are kept with it so that a saved target never depends on the library that computed them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fine_dist.model.arch import Arch
    from fine_dist.model.dit import DiT


class SvdiffConfig(MethodConfig):
    """SVDiff: shifts of singular values."""

    name: Literal["svdiff"] = "svdiff"
    """SVDiff."""


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
        from fine_dist.model.roles import of_role, train_only

        source = needed(parent).module
        model = self.module(target, {})
        model.load_state_dict({**model.state_dict(), **of_role(source, "shell")})
        for own, theirs in zip(_matrices(model), _matrices(source)):
            own.take(theirs.weight.detach(), theirs.bias.detach())  # type: ignore[operator]
        train_only(model, "scaler")
        return Descent(model, "some")

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> DiT:
        from fine_dist.model.dit import DiT
        from fine_dist.model.spectral import SpectralDense

        return DiT(arch, lambda matrix, layer: SpectralDense(*reversed(arch.matrix(matrix))))

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        from fine_dist.model.roles import of_role
        from fine_dist.model.spectral import SpectralDense

        state = {name: tensor.clone() for name, tensor in of_role(model, "shell", "bias").items()}
        for name, module in model.named_modules():
            if isinstance(module, SpectralDense):
                state[f"{name}.weight"] = module.compose().detach().clone()
        return state

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        import torch

        from fine_dist.model.arch import MATRICES

        blocks = list(model.blocks)  # type: ignore[arg-type]
        return {
            name: torch.stack([block.get_submodule(name).delta.detach().float().cpu() for block in blocks])
            for name in MATRICES
        }


def _matrices(model: nn.Module) -> list[nn.Module]:
    from fine_dist.model.arch import MATRICES

    return [block.get_submodule(matrix) for block in model.blocks for matrix in MATRICES]  # type: ignore[union-attr]
