"""What a method is: a rule that turns shared genes and a layer's own scalers into that layer's weights.

A method file holds its `Config`, its `Method` subclass and its paper; `methods/__init__.py` lists it. torch is imported
inside functions, because configs are read by commands whose `--help` must answer at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from fine_dist.config import Config
from fine_dist.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from fine_dist.model.artifact import Artifact
    from fine_dist.model.dit import DiT
    from fine_dist.model.zoo import Arch


class MethodConfig(Config):
    """Settings every method has."""

    name: str
    """Which method."""


M = TypeVar("M", bound=MethodConfig)


@dataclass(frozen=True)
class FitReport:
    """What a closed-form start leaves of an ancestor's weights: relative error, by kind and layer."""

    error: dict[str, list[float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A table to print: a row a kind, its mean, then its layers."""
        rows = ["relative error of the start, by kind: mean | layer by layer"]
        for kind, errors in self.error.items():
            layers = " ".join(f"{e:.3f}" for e in errors)
            rows.append(f"  {kind:6} {sum(errors) / len(errors):.3f} | {layers}")
        return rows


class Method(ABC, Generic[M]):
    """One way to initialise descendants. The defaults are those of a baseline that condenses nothing.

    Config: its settings.  paper: where it comes from.  summary: one line for lists.
    """

    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, config: M):
        self.config = config

    def learngene(self, arch: Arch, generator: torch.Generator) -> DiT | None:
        """The module that stage 1 trains for this ancestor; none for a method without stage 1."""
        return None

    def fit(self, learngene: DiT, ancestor: DiT, generator: torch.Generator) -> FitReport:
        """Put a closed-form start, taken from an ancestor's weights, into the learngene."""
        raise ArtifactError(f"method {self.config.name} has no closed-form start from an ancestor; use start: joint")

    @abstractmethod
    def descend(self, artifact: Artifact | None, target: Arch, generator: torch.Generator) -> DiT:
        """The target before any training of its own.

        Its parameters with `requires_grad` are what stage 2 trains; when nothing is left for stage 2 the result is a
        dense DiT, ready to be trained.
        """

    def merge(self, model: DiT) -> dict[str, torch.Tensor]:
        """The state dict of an ordinary dense DiT of the same function."""
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_descent(artifact: Artifact | None, target: Arch, method: str) -> Artifact:
    """The artifact, if a target may descend from it; an `ArtifactError` says what does not fit."""
    if artifact is None:
        raise ArtifactError(f"method {method} starts from a learngene; give the folder that condense wrote")
    if artifact.kind != "learngene" or artifact.method.get("name") != method:
        raise ArtifactError(
            f"{artifact.folder} is a {artifact.method.get('name')} {artifact.kind}, not a {method} learngene"
        )
    source = artifact.arch
    if target.hidden_size > source.hidden_size:
        raise ArtifactError(
            f"the target's width {target.hidden_size} is larger than the factors' {source.hidden_size}; "
            f"condense an ancestor at least that wide, or choose a target of width {source.hidden_size}"
        )
    for name in ("hidden_size", "num_heads", "patch_size", "in_channels", "input_size", "num_classes", "learn_sigma"):
        if getattr(target, name) != getattr(source, name):
            raise ArtifactError(
                f"{artifact.folder}: {name} is {getattr(source, name)} in the learngene, "
                f"{getattr(target, name)} in the target; they must agree (only the depth is free)"
            )
    return artifact
