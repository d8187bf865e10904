"""FINE (arXiv 2409.19289): `W(l) = U diag(sigma(l)) V^T` with U and V shared by all layers.

Stage 1 trains U, V, sigma and what is outside the blocks on the plain diffusion loss (eq. 5), from random factors
(`joint`) or from the CP decomposition of an ancestor's weights (`decompose`). Stage 2 trains a target's sigma alone.

Choices where the paper is silent: R = D; biases are a layer's own, interpolated over relative depth for a target and
frozen in stage 2; sigma of adaLN starts at zero (adaLN-zero), the others' on a line in depth (`line_in_depth`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fine_dist.errors import ArtifactError
from fine_dist.methods.base import FitReport, Method, MethodConfig, check_descent
from fine_dist.model.depth import STARTS

if TYPE_CHECKING:
    import torch

    from fine_dist.model.artifact import Artifact
    from fine_dist.model.dit import DiT
    from fine_dist.model.factors import FactoredDiT
    from fine_dist.model.zoo import Arch


class FineConfig(MethodConfig):
    """FINE: factors shared by all layers, sigma a layer's own."""

    name: Literal["fine"] = "fine"
    """FINE."""
    rank: int | None = Field(None, ge=1)
    """Components R of every kind; none: the width D."""
    start: Literal["joint", "decompose"] = "joint"
    """Stage 1 starts from random factors, or from the CP decomposition of an ancestor."""
    sweeps: int = Field(50, ge=1)
    """Sweeps of alternating least squares at most (start: decompose)."""
    path: Literal["auto", "composed", "factored"] = "auto"
    """How products are computed: by whichever needs fewer multiply-adds, or always one way."""
    sigma: Literal["linear", "random", "identical", "segment", "aligned"] | None = None
    """Where a target's sigma starts; none: `segment`, or `aligned` where factors were decomposed from an ancestor."""


class Fine(Method[FineConfig]):
    """FINE's three stages."""

    Config: ClassVar[type[MethodConfig]] = FineConfig
    paper: ClassVar[str] = "FINE, arXiv 2409.19289"
    summary: ClassVar[str] = "shared factors U, V; a target trains sigma alone"

    def learngene(self, arch: Arch, generator: torch.Generator) -> FactoredDiT:
        from fine_dist.model.factors import FactoredDiT

        return FactoredDiT(arch, self.config.rank or arch.hidden_size, generator, self.config.path)

    def fit(self, learngene: DiT, ancestor: DiT, generator: torch.Generator) -> FitReport:
        """CP of each kind's weights over layers; biases and what is outside the blocks are copied."""
        import torch

        from fine_dist.model.cp import decompose
        from fine_dist.model.factors import FactoredDiT, role
        from fine_dist.model.zoo import KINDS

        assert isinstance(learngene, FactoredDiT)
        if ancestor.arch != learngene.arch:
            raise ArtifactError(
                f"the ancestor is {ancestor.arch.name} ({ancestor.arch}), the learngene {learngene.arch.name} "
                f"({learngene.arch}); decompose needs them equal"
            )
        state = ancestor.state_dict()
        errors: dict[str, list[float]] = {}
        with torch.no_grad():
            own = learngene.state_dict()
            for name in own:
                if role(name) in ("outside", "bias"):
                    own[name].copy_(state[name])
            for kind in KINDS:
                stack = torch.stack([state[f"blocks.{i}.{kind}.weight"] for i in range(ancestor.arch.num_layers)])
                fit = decompose(stack, learngene.rank, sweeps=self.config.sweeps, generator=generator)
                genes = learngene.factor(kind)
                genes.U.copy_(fit.U)
                genes.V.copy_(fit.V)
                for layer in range(ancestor.arch.num_layers):
                    learngene.sigma(kind, layer).copy_(fit.sigma[layer])
                errors[kind] = fit.error.tolist()
        return FitReport(errors)

    @property
    def sigma_start(self) -> str:
        """The start in use. Layers decomposed one by one have no common course over depth that a mean could keep."""
        return self.config.sigma or ("segment" if self.config.start == "joint" else "aligned")

    def descend(self, artifact: Artifact | None, target: Arch, generator: torch.Generator) -> FactoredDiT:
        import torch

        from fine_dist.model.factors import FactoredDiT
        from fine_dist.model.zoo import KINDS

        artifact = check_descent(artifact, target, self.config.name)
        tensors, depth = artifact.tensors, artifact.arch.num_layers
        model = FactoredDiT(target, tensors["genes.qkv.U"].shape[1], generator, self.config.path)
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.")}
        for kind in KINDS:
            table = torch.stack([tensors[f"blocks.{layer}.{kind}.sigma"] for layer in range(depth)])
            biases = torch.stack([tensors[f"blocks.{layer}.{kind}.bias"] for layer in range(depth)])
            start = STARTS[self.sigma_start].layers(kind, table, biases, target.num_layers, generator)
            for layer, (s, b) in enumerate(zip(*start)):
                state[f"blocks.{layer}.{kind}.sigma"] = s
                state[f"blocks.{layer}.{kind}.bias"] = b
        model.load_state_dict(state)
        return model.train_only("scaler")

    def merge(self, model: DiT) -> dict[str, torch.Tensor]:
        from fine_dist.model.factors import FactoredDiT

        assert isinstance(model, FactoredDiT)
        return model.merge()
