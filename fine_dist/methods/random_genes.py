"""A control: FINE's stage 2 with frozen *random* factors, so that sigma's own part is not credited to genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fine_dist.methods.base import Method, MethodConfig, check_descent

if TYPE_CHECKING:
    import torch

    from fine_dist.model.artifact import Artifact
    from fine_dist.model.dit import DiT
    from fine_dist.model.factors import FactoredDiT
    from fine_dist.model.zoo import Arch


class RandomGenesConfig(MethodConfig):
    """Control: random U and V, trained sigma, everything outside the blocks copied from FINE's learngene."""

    name: Literal["random_genes"] = "random_genes"
    """Control without learned factors."""


class RandomGenes(Method[RandomGenesConfig]):
    """Same rank, same trained numbers, same copied parts as FINE; U and V as at the start of stage 1."""

    Config: ClassVar[type[MethodConfig]] = RandomGenesConfig
    paper: ClassVar[str] = "control for FINE, arXiv 2409.19289"
    summary: ClassVar[str] = "control: frozen random factors, trained sigma"

    def descend(self, artifact: Artifact | None, target: Arch, generator: torch.Generator) -> FactoredDiT:
        from fine_dist.model.dit import outside_blocks
        from fine_dist.model.factors import FactoredDiT

        artifact = check_descent(artifact, target, "fine")
        model = FactoredDiT(target, artifact.tensors["genes.qkv.U"].shape[1], generator)
        model.load_state_dict({**model.state_dict(), **outside_blocks(artifact.tensors)})
        return model.train_only("scaler")

    def merge(self, model: DiT) -> dict[str, torch.Tensor]:
        from fine_dist.model.factors import FactoredDiT

        assert isinstance(model, FactoredDiT)
        return model.merge()
