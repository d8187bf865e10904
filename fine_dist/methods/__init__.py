"""The methods, in one dict. To add one: write its file, list it here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fine_dist.core.config import Config, union_of
from fine_dist.methods.auto_lg import AutoLg
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, Weights
from fine_dist.methods.difffit import DiffFit
from fine_dist.methods.fine import Fine, FineConfig
from fine_dist.methods.he import He, HeConfig
from fine_dist.methods.heur_lg import HeurLg
from fine_dist.methods.kind import Kind
from fine_dist.methods.learngene_pool import LearngenePool
from fine_dist.methods.ligo import Ligo
from fine_dist.methods.mimetic import Mimetic
from fine_dist.methods.outside import Outside
from fine_dist.methods.peft_methods import Boft, Lora, Oft, Pissa, Vera
from fine_dist.methods.random_genes import RandomGenes
from fine_dist.methods.snnet import Snnet
from fine_dist.methods.svd import Svd
from fine_dist.methods.svdiff import Svdiff
from fine_dist.methods.sws import Sws
from fine_dist.methods.tleg import Tleg
from fine_dist.methods.wave import Wave
from fine_dist.methods.weight_selection import WeightSelection

if TYPE_CHECKING:
    from torch import nn

    from fine_dist.model.arch import Arch
    from fine_dist.model.artifact import Artifact

METHODS: dict[str, type[Method[Any]]] = {
    "fine": Fine,
    "he": He,
    "outside": Outside,
    "random_genes": RandomGenes,
    "auto_lg": AutoLg,
    "boft": Boft,
    "difffit": DiffFit,
    "heur_lg": HeurLg,
    "kind": Kind,
    "learngene_pool": LearngenePool,
    "ligo": Ligo,
    "lora": Lora,
    "mimetic": Mimetic,
    "oft": Oft,
    "pissa": Pissa,
    "snnet": Snnet,
    "svd": Svd,
    "svdiff": Svdiff,
    "sws": Sws,
    "tleg": Tleg,
    "vera": Vera,
    "wave": Wave,
    "weight_selection": WeightSelection,
}

AnyMethod = union_of([method.Config for method in METHODS.values()])
"""Annotation of a config field that holds the settings of any one method."""
CONDENSES: MethodConfig = FineConfig()
"""What stage 1 does unless it is told."""
SCRATCH: MethodConfig = HeConfig()
"""What needs no parent."""


def build(config: MethodConfig) -> Method[Any]:
    """The method that these settings are for."""
    return METHODS[config.name](config)


def from_manifest(settings: dict[str, Any]) -> Method[Any]:
    """The method that an artifact's manifest names."""
    from fine_dist.core.config import validate
    from fine_dist.core.errors import ArtifactError, nearest

    name = str(settings.get("name"))
    if name not in METHODS:
        raise ArtifactError(f"method {name!r} is not known here; {nearest(name, METHODS)}")
    kind = METHODS[name].Config
    return build(validate(kind, settings, "method in the manifest"))


def parent_of(artifact: Artifact) -> Parent:
    """An artifact with its tensors in a module of the method that made it."""
    method = from_manifest(artifact.method)
    if artifact.kind == "learngene" or not method.traits.dense:
        module = method.module(artifact.arch, artifact.tensors)
    else:
        from fine_dist.model.dit import DiT

        module = DiT(artifact.arch)
    load_into(module, artifact)
    return Parent(artifact, module)


def load_into(module: nn.Module, artifact: Artifact) -> None:
    """Put an artifact's tensors into a module. `ArtifactError` when names or shapes are not the module's."""
    from fine_dist.core.errors import ArtifactError

    try:
        module.load_state_dict(artifact.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{artifact.folder} does not hold what its manifest says: {reason}") from None


def check(method: Method[Any], parent: Artifact | None, target: Arch) -> None:
    """`Method.check`, whose error also names the methods that could."""
    from fine_dist.core.errors import ArtifactError

    try:
        method.check(parent, target)
    except ArtifactError as error:
        able = [name for name in METHODS if name != method.config.name and _could(name, parent, target)]
        raise ArtifactError(f"{error}; methods that could: {', '.join(able)}" if able else str(error)) from None


def _could(name: str, parent: Artifact | None, target: Arch) -> bool:
    from fine_dist.core.errors import ArtifactError

    try:
        METHODS[name](METHODS[name].Config(name=name)).check(parent, target)
    except ArtifactError:
        return False
    return True


__all__ = [
    "CONDENSES",
    "METHODS",
    "SCRATCH",
    "AnyMethod",
    "Condensation",
    "Config",
    "Descent",
    "Method",
    "MethodConfig",
    "Parent",
    "Traits",
    "Weights",
    "build",
    "check",
    "from_manifest",
    "load_into",
    "parent_of",
]
