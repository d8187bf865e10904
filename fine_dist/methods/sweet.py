"""SWEET (Xie et al., arXiv 2601.19694): one template for all matrices of all layers, in Tucker form.

The source (its abstract and summaries): a network's weights are cut into D x D slabs and stacked to a tensor
[S L, D, D], which is constrained to `G x_1 X x_2 U x_3 V`. The core G is the template, shared by models of every size;
X (over layers), U and V (over width) are scalers that belong to one size. Pre-training is that of a model from scratch
under the constraint; a target keeps G and learns its own X, U and V from little data. During pre-training the template
is scaled at random along its two dimensions of width, so that it does not depend on the scalers of one width.

Choices of this project, where the source does not say or describes other networks:

- A DiT block has 18 slabs: 3 of qkv, 1 of o, 4 each of in and out, 6 of adaln. Each layer has its own biases.
- G has 24 components, r_2 = r_3 = D: with that many its numbers are about those of FINE's factors of rank D.
- The random scaling multiplies each component of U and V by a number drawn uniformly from 1 - s to 1 + s at every step
  (`scaling`). It applies only while gradients are recorded, so that evaluation sees the unscaled learngene.
- U and V start with orthonormal columns, X on a line in depth with the variance that makes Var(W) Xavier's, zero for
  adaLN. Pre-training is the diffusion loss; with an ancestor its output is imitated as well.
- A target's X is initialized over depth like FINE's sigma, and rows of U and V are repeated or left out uniformly
  (`wave/width.py`): whole heads where heads keep their size, features one by one otherwise.

Shapes: D width, S slabs of a matrix (18 of a block), R components of the template, r its side (r_2 = r_3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, Varies, needed
from fine_dist.methods.settings import SweetConfig
from fine_dist.methods.shared import dense_state
from fine_dist.methods.wave.width import Widening
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.depth import INITIALS
from fine_dist.model.dit import Condition, DiT
from fine_dist.model.factors import line_in_depth, spread_columns
from fine_dist.model.roles import Role, of_role, train_only


class Sweet(Method[SweetConfig]):
    """A Tucker core shared by all matrices, scalers for depth and width."""

    Config: ClassVar[type[MethodConfig]] = SweetConfig
    label: ClassVar[str] = "SWEET"
    paper: ClassVar[str] = "SWEET, arXiv 2601.19694"
    summary: ClassVar[str] = "one Tucker core for all matrices; a target trains its scalers, in depth and width"
    tables_of: ClassVar[str] = "scaler norm"

    @property
    def traits(self) -> Traits:
        varies: frozenset[Varies] = frozenset({"depth", "width"})
        return Traits(parents=("learngene",), varies=varies, condenses=True, ancestor="may")

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"scalers": tuple(INITIALS)}

    # --- stage 1 ----------------------------------------------------------------------------------------------------

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        module = self.blueprint(arch, generator)
        return Condensation(module, before_step=module.template.drawing(self.config.scaling))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> TuckerDiT:
        return TuckerDiT(arch, self.config.components, self.config.side or arch.hidden_size, generator)

    # --- stage 2 ----------------------------------------------------------------------------------------------------

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        core: TuckerCore = source.template
        model = TuckerDiT(target, core.components, core.side, generator)
        heads = {a.hidden_size // a.num_heads for a in (source.arch, target)}
        unit = heads.pop() if len(heads) == 1 else 1
        width = Widening(source.arch.hidden_size, target.hidden_size, unit, tiles=True)
        features, inputs = width.features(), width.inputs()
        state = {
            **width.shell(of_role(source, "shell")),
            "template.G": core.G.detach(),
            "template.U": core.U.detach()[features],
            "template.V": core.V.detach()[features] * inputs[:, None],
        }
        for matrix in MATRICES:
            scalers, biases = source.layers_of(matrix)
            begin = INITIALS[self.config.scalers]
            layers = begin.layers(matrix, scalers.flatten(1), biases, target.num_layers, generator)
            for layer, (flat, bias) in enumerate(zip(*layers)):
                state[f"blocks.{layer}.{matrix}.X"] = flat.reshape(scalers.shape[1:])
                state[f"blocks.{layer}.{matrix}.bias"] = width.bias(matrix, bias)
        model.load_state_dict(state)
        return Descent(train_only(model, "scaler"), "some")

    # --- results ----------------------------------------------------------------------------------------------------

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        if "template.G" not in tensors:
            raise ArtifactError("these tensors have no Tucker core (template.G): no learngene of this method")
        components, side, _ = tensors["template.G"].shape
        return TuckerDiT(arch, components, side)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        return dense_state(model)

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        """The norm of each layer's scalers by component, [L, R] for each matrix."""
        source: Any = model
        return {matrix: source.layers_of(matrix)[0].norm(dim=1) for matrix in MATRICES}


class TuckerCore(nn.Module):
    """The core G [R, r, r] and the scalers of one width, U and V [D, r].

    `forward(x [..., n], X [S, R], bias, columns) -> [..., m]`. The three parameters are in one module, because ZeRO-3
    gathers the parameters of the module that is called.
    """

    roles: ClassVar[dict[str, Role]] = {"G": "gene", "U": "scaler", "V": "scaler"}
    scale_u: Tensor
    scale_v: Tensor

    def __init__(self, components: int, side: int, width: int, generator: torch.Generator | None = None):
        super().__init__()
        # scaled by sqrt(r): entries of G then have the size of ordinary weights, which suits the step size of Adam
        core = spread_columns(side * side, components, generator).T.reshape(components, side, side) * math.sqrt(side)
        self.G = nn.Parameter(core.contiguous())
        self.U = nn.Parameter(spread_columns(width, side, generator))
        self.V = nn.Parameter(spread_columns(width, side, generator))
        self.register_buffer("scale_u", torch.ones(side), persistent=False)
        self.register_buffer("scale_v", torch.ones(side), persistent=False)

    @property
    def components(self) -> int:
        return len(self.G)

    @property
    def side(self) -> int:
        return self.G.shape[1]

    def forward(self, x: Tensor, scaler: Tensor, bias: Tensor, columns: bool) -> Tensor:
        return F.linear(x, self.compose(scaler, columns), bias)

    def compose(self, scaler: Tensor, columns: bool) -> Tensor:
        """The weight of these scalers: slabs stacked vertically [S D, D], or horizontally [D, S D] if `columns`."""
        u: Tensor = self.U
        v: Tensor = self.V
        if torch.is_grad_enabled():
            u, v = u * self.scale_u, v * self.scale_v
        mixed = (scaler @ self.G.flatten(1)).unflatten(1, self.G.shape[1:])  #                                [S, r, r]
        slabs: Tensor = u @ (mixed @ v.T)  #                                                                  [S, D, D]
        return slabs.transpose(0, 1).flatten(1) if columns else slabs.flatten(0, 1)

    def drawing(self, scaling: float) -> Callable[[int, torch.Generator], None] | None:
        """A hook that draws the random scaling of the template before every step; None if `scaling` is 0."""
        if not scaling:
            return None

        def before_step(step: int, generator: torch.Generator) -> None:
            for scale in (self.scale_u, self.scale_v):
                scale.copy_(1 + scaling * (2 * torch.rand(len(scale), generator=generator) - 1))

        return before_step


class TuckerLinear(nn.Module):
    """One layer's matrix: its own scalers X [S, R] and bias [m]; the template belongs to the root."""

    roles: ClassVar[dict[str, Role]] = {"X": "scaler", "bias": "bias"}

    def __init__(self, template: TuckerCore, m: int, n: int):
        super().__init__()
        self._template = (template,)
        width = len(template.U)
        self.columns = n > width
        self.X = nn.Parameter(torch.zeros(m * n // width**2, template.components))
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        y: Tensor = self._template[0](x, self.X, self.bias, self.columns)
        return y

    def dense(self) -> tuple[Tensor, Tensor]:
        """The weight [m, n] and bias [m] that this layer multiplies by."""
        return self._template[0].compose(self.X, self.columns), self.bias

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of computing W and a product of `rows` rows; `backward` adds those of the backward pass."""
        [template] = self._template
        d, r, slabs = len(template.U), template.side, len(self.X)
        mix = slabs * template.G.numel()
        shape, product = slabs * r * d * (r + d), rows * slabs * d * d
        if not backward:
            return mix + shape + product
        core, own = template.G.requires_grad, self.X.requires_grad
        trains = core or own or template.U.requires_grad
        return mix * (1 + core + own) + (shape * 3 + product * 3 if trains else shape + product * 2)

    def saved_for_backward(self, rows: int) -> int:
        """Numbers saved for the backward pass in addition to a dense product's: W and the intermediate slabs."""
        [template] = self._template
        d, r = len(template.U), template.side
        return len(self.X) * (d * d + r * d + r * r)


class TuckerDiT(DiT):
    """A DiT whose block matrices are all computed from one template [R, r, r] and scalers of layers and width."""

    def __init__(self, arch: Arch, components: int, side: int, generator: torch.Generator | None = None):
        template = TuckerCore(components, side, arch.hidden_size, generator)
        super().__init__(arch, lambda matrix, layer: TuckerLinear(template, *arch.matrix(matrix)), generator)
        self.template = template
        for matrix in MATRICES:
            if matrix == "adaln":  # adaLN-zero: a block starts as the identity
                continue
            # orthonormal U, V and slices of G: a weight's variance is R E[X^2] r / D^2
            m, n = arch.matrix(matrix)
            std = arch.hidden_size * math.sqrt(2 / ((m + n) * components * side))
            first: Any = self.blocks[0].get_submodule(matrix)
            line = line_in_depth(arch.num_layers, first.X.numel(), std, generator)
            for block, values in zip(self.blocks, line):
                own: Any = block.get_submodule(matrix)
                with torch.no_grad():
                    own.X.copy_(values.reshape(own.X.shape))

    def layers_of(self, matrix: str) -> tuple[Tensor, Tensor]:
        """A matrix's scalers [L, S, R] and biases [L, m] over depth, detached, on the CPU."""
        modules: list[Any] = [block.get_submodule(matrix) for block in self.blocks]
        scalers = torch.stack([module.X.detach().float().cpu() for module in modules])
        return scalers, torch.stack([module.bias.detach().float().cpu() for module in modules])
