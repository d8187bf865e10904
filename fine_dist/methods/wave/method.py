"""WAVE (arXiv 2406.17503, CVPR 2025): `W(l) = sum_t kron(S(l, t), T(t))`, templates T shared, scalers S a layer's own.

Stage 1 trains templates, scalers and what is outside the blocks on the diffusion loss and the squared difference to
the ancestor's full output. Stage 2 freezes all but S, of the target's depth *and width*, whose grid of tiles grows with
it; then the target is merged and trained as usual.

Choices: `kron(S, T)`, which tiles whole scaled templates (a note on the paper has `kron(T, S)`, the other value of
`order`); templates of 192 x 192, which divide the widths 384 and 768, for all five matrices; as many of a matrix as it
has tiles, so that they could make any one layer exactly. S starts on a line in depth, and a target's as FINE's sigma
does (`scalers`; the value `random` draws it anew). Biases go with S over depth. To another width tiles are repeated or
left out at uniform spacing, outside the blocks too (`wave/width.py`); with heads of the same size a target of twice
the width then begins as the parent's own function, but for the position table, which is fixed: stage 2 relearns
positions. (With `kron(T, S)` features are repeated one by one, in which the table's frequencies nearly agree: such a
target begins closer, and both end alike.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, Weights, needed
from fine_dist.methods.shared import dense_state
from fine_dist.methods.wave.config import WaveConfig
from fine_dist.methods.wave.kronecker import KronDiT, tiles_of
from fine_dist.methods.wave.width import Widening
from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.depth import INITIALS
from fine_dist.model.dit import DiT
from fine_dist.model.roles import of_role, train_only


class Wave(Method[WaveConfig]):
    """Templates and Kronecker scalers."""

    Config: ClassVar[type[MethodConfig]] = WaveConfig
    label: ClassVar[str] = "WAVE"
    paper: ClassVar[str] = "WAVE, arXiv 2406.17503"
    summary: ClassVar[str] = "shared templates; a target trains its Kronecker scalers, in depth and width"
    tables_of: ClassVar[str] = "scaler norm"

    @property
    def traits(self) -> Traits:
        return Traits(
            parents=("learngene",),
            varies=frozenset({"depth", "width"}),
            condenses=True,
            ancestor="must",
            loss=Weights(diffusion=1.0, output=1.0),
        )

    def check(self, parent: Artifact | None, target: Arch) -> None:
        super().check(parent, target)
        side = parent.tensors["templates.qkv.T"].shape[1] if parent else self.config.side
        if target.hidden_size % side:
            raise ArtifactError(
                f"hidden_size {target.hidden_size} of the target is no multiple of {side}, the side of the templates"
            )

    def check_parent(self, parent: Artifact) -> None:
        super().check_parent(parent)
        order = parent.method.get("order", self.config.order)
        if order != self.config.order:
            raise ArtifactError(f"{parent.folder} was condensed with method.order {order}, not {self.config.order}")

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"scalers": tuple(INITIALS)}

    # --- stage 1 ----------------------------------------------------------------------------------------------------

    def auxiliary(self, arch: Arch) -> Arch:
        if arch.hidden_size % self.config.side:
            legal = [w for w in range(1, arch.hidden_size + 1) if arch.hidden_size % w == 0]
            raise ConfigError(
                f"method.side: templates of {self.config.side} do not divide hidden_size {arch.hidden_size}; one of "
                f"{legal}, and of every other width that is wanted"
            )
        return arch

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        return Condensation(self.blueprint(arch, generator))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> KronDiT:
        side, count = self.config.side, self.config.templates
        counts = dict.fromkeys(MATRICES, count) if count else tiles_of(self.auxiliary(arch), side)
        return KronDiT(self.auxiliary(arch), side, counts, self.config.order, generator)

    # --- stage 2 ----------------------------------------------------------------------------------------------------

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source: Any = needed(parent).module
        model = KronDiT(target, source.side, source.counts, source.order, generator)
        tiles = source.order == "scaler_template"
        width = Widening(source.arch.hidden_size, target.hidden_size, source.side, tiles)
        state = {**of_role(source, "gene"), **width.shell(of_role(source, "shell"))}
        for matrix in MATRICES:
            scalers, biases = source.layers_of(matrix)
            begin = INITIALS[self.config.scalers]
            layers = begin.layers(matrix, scalers.flatten(1), biases, target.num_layers, generator)
            for layer, (flat, bias) in enumerate(zip(*layers)):
                name = f"blocks.{layer}.{matrix}"
                state[f"{name}.S"] = width.scalers(matrix, flat.reshape(scalers.shape[1:]))
                state[f"{name}.bias"] = width.bias(matrix, bias)
        model.load_state_dict(state)
        train_only(model, "scaler")
        return Descent(model, "some")

    # --- results ----------------------------------------------------------------------------------------------------

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        try:
            counts = {matrix: len(tensors[f"templates.{matrix}.T"]) for matrix in MATRICES}
        except KeyError as absent:
            raise ArtifactError(f"these tensors have no templates ({absent}): no learngene of this method") from None
        return KronDiT(arch, tensors["templates.qkv.T"].shape[1], counts, self.config.order)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        return dense_state(model)

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        """The norm of each layer's scalers by template, [L, K] for each matrix."""
        source: Any = model
        return {matrix: source.layers_of(matrix)[0].flatten(2).norm(dim=2) for matrix in MATRICES}
