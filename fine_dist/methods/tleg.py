"""TLEG (arXiv 2312.05614, AAAI 2024): all layers on one line, `theta_l = theta_B + (l - 1) / L theta_A` (eq. 1).

Stage 1 trains theta_A, theta_B and what is outside the blocks in an auxiliary model, by soft distillation of the
ancestor's output alone (the paper's alpha is 1; `loss: {diffusion: 1 - alpha, output: alpha}` gives another). A target
of L layers takes L places on the line, biases too, and is an ordinary DiT at once: nothing of it waits for a stage 2.

The auxiliary model's depth is a setting of the method's own, whatever the ancestor's: it is the depth of the learngene
as an artifact, and of the model that the learngene is when it is evaluated. *Choice*, as a DiT needs it: adaLN's
weights are zero on both ends of the line, so that a block begins as the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fine_dist.core.config import Depth
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, Weights, needed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fine_dist.model.arch import Arch
    from fine_dist.model.dit import DiT
    from fine_dist.model.shared import SharedDiT


class TlegConfig(MethodConfig):
    """TLEG: layers on a line between two shared blocks."""

    name: Literal["tleg"] = "tleg"
    """TLEG."""
    auxiliary_layers: Depth | None = 12
    """Layers of the model that stage 1 trains; none: as many as `arch` has."""


class Tleg(Method[TlegConfig]):
    """Linear expansion."""

    Config: ClassVar[type[MethodConfig]] = TlegConfig
    label: ClassVar[str] = "TLEG"
    paper: ClassVar[str] = "TLEG, arXiv 2312.05614"
    summary: ClassVar[str] = "two shared blocks; a target's layers lie on the line through them"

    @property
    def traits(self) -> Traits:
        return Traits(
            parents=("learngene",),
            varies=frozenset({"depth"}),
            condenses=True,
            ancestor="must",
            loss=Weights(diffusion=0.0, output=1.0),
        )

    def auxiliary(self, arch: Arch) -> Arch:
        return arch.with_depth(self.config.auxiliary_layers or arch.num_layers)

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        return Condensation(self.blueprint(arch, generator))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> SharedDiT:
        from fine_dist.model.shared import on_a_line

        return on_a_line(self.auxiliary(arch), generator)

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        from fine_dist.model.dit import DiT
        from fine_dist.model.shared import expanded, line_places

        source, places = needed(parent).module, line_places(target.num_layers)
        genes: Any = source.genes
        model = DiT(target, generator=generator)
        model.load_state_dict(
            expanded(source, target.num_layers, lambda matrix, layer: genes[matrix].dense(places[layer]))
        )
        return Descent(model)

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        from fine_dist.model.dit import DiT
        from fine_dist.model.shared import on_a_line

        return on_a_line(arch) if "genes.qkv.base" in tensors else DiT(arch)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        from fine_dist.model.shared import dense_state

        return dense_state(model)
