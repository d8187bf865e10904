"""The interface of a method: a rule that turns shared genes and a layer's own scalers into that layer's weights.

Settings (`MethodConfig`) are in modules without torch, because every command's `--help` shows them. The code of a
method is a `Method` in one file, or in a folder together with its layers. `methods/__init__.py` lists both.
The rest of the package knows methods only through this interface: the parents of a target, what stage 1 trains and on
which loss, what stage 2 trains, how the result becomes an ordinary model, its cost, and its tables. The defaults are
those of a baseline without stage 1. Three defaults import torch late, because modules of settings import this module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from fine_dist.core.config import Config
from fine_dist.core.errors import ArtifactError, ConfigError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fine_dist.model.arch import Arch
    from fine_dist.model.artifact import Artifact
    from fine_dist.model.dit import DiT
    from fine_dist.model.factors import SharedForm
    from fine_dist.model.flops import ModelCost


class MethodConfig(Config):
    """Settings that every method has."""

    name: str
    """Name of the method."""


M = TypeVar("M", bound=MethodConfig, covariant=True)

Varies = Literal["depth", "width", "classes", "resolution"]
ALWAYS = ("patch_size", "in_channels", "learn_sigma")
"""Fields of the architecture that a target shares with its parent under every method."""
FIELDS: dict[Varies, tuple[str, ...]] = {
    "resolution": ("input_size", "position_grid"),
    "width": ("hidden_size", "num_heads"),
    "classes": ("num_classes",),
    "depth": ("num_layers",),
}
"""Fields of the architecture that belong to each property in which a target may differ."""


@dataclass(frozen=True)
class Weights:
    """Weights of the terms of stage 1's loss; a term of weight 0 is not computed."""

    diffusion: float = 1.0
    output: float = 0.0
    """Mean squared difference to the teacher's full output."""
    features: float = 0.0
    """Mean squared difference to the teacher's features, for the pairs in `Condensation.pairs`."""


@dataclass(frozen=True)
class Traits:
    """The abilities of a method, known before anything is built."""

    parents: tuple[Literal["none", "learngene", "model"], ...] = ("none",)
    """Kinds of parents that a target may be made from."""
    varies: frozenset[Varies] = frozenset({"depth", "width", "classes"})
    """Properties in which a target may differ from its parent."""
    condenses: bool = False
    """Whether the method has a stage 1."""
    ancestor: Literal["no", "may", "must"] = "no"
    """Whether stage 1 starts from or imitates a trained model: never, if one is given, or always."""
    same_shape: bool = False
    """Whether the ancestor must have the architecture that stage 1 trains. Otherwise only latents and classes must
    agree."""
    carries_over: bool = False
    """Whether stage 1 starts from the weights of the ancestor's blocks (`Method.carry_over`)."""
    loss: Weights = Weights()
    """Default weights of stage 1's loss. If the ancestor is optional and one is given, its output is imitated with
    weight 1 as well."""
    dense: bool = True
    """Whether the result is an ordinary DiT; otherwise it is saved and loaded as the method's own module."""
    samples: int = 0
    """Number of samples of the target's data that `descend` uses, if data are given."""


@dataclass(frozen=True)
class Parent:
    """The parent of a target: its artifact, and a module of its method with the artifact's tensors."""

    artifact: Artifact
    module: nn.Module
    samples: tuple[Tensor, Tensor] | None = None
    """Latents [N, C, H, H] of the target's data and labels [N] (null labels if the classes differ from the parent's),
    for a method that uses samples (`Traits.samples`)."""

    @property
    def arch(self) -> Arch:
        return self.artifact.arch


@dataclass
class Condensation:
    """The initialized modules of stage 1.

    Attributes:
        module: Trained module: `(z, t, y) -> output`, or a `ModelOutput` with features. All its parameters train.
        pairs: (feature of `module`, feature of the teacher) for the loss term `features`.
        before_step: Called on every rank before each step with the step and a generator seeded by (seed, step).
        report: Facts about the initialization for the manifest (JSON).
        lines: The same facts as lines to print.
        prefix: State-dict prefix of the part that is saved as the learngene; empty: all of `module`.
    """

    module: nn.Module
    pairs: Sequence[tuple[str, str]] = ()
    before_step: Callable[[int, torch.Generator], None] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()
    prefix: str = ""

    def product(self, module: nn.Module) -> nn.Module:
        """The part of a trained module, or of a copy of it, that is the learngene."""
        return module.get_submodule(self.prefix.rstrip(".")) if self.prefix else module


@dataclass
class Descent:
    """An initialized target that is not trained yet.

    Attributes:
        model: The target.
        trains: What stage 2 trains: `nothing`, `some` (parameters with `requires_grad`) or `all`.
    """

    model: nn.Module
    trains: Literal["nothing", "some", "all"] = "nothing"


class Method(ABC, Generic[M]):
    """A method that initializes targets.

    Attributes:
        Config: Class of the settings.
        label: Name in tables.
        paper: The method's source.
        summary: One line for lists of methods.
    """

    Config: ClassVar[type[MethodConfig]]
    label: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    tables_of: ClassVar[str] = ""
    """Title of the figures of `tables`; empty for a method without tables."""

    def __init__(self, config: M):
        self.config = config

    # --- abilities --------------------------------------------------------------------------------------------------

    @property
    def traits(self) -> Traits:
        """The abilities of the method with these settings."""
        return Traits()

    def check(self, parent: Artifact | None, target: Arch) -> None:
        """Check that a target of this architecture can be made from this parent, without building anything.

        Raises:
            ArtifactError: The target cannot be made; the message says why.
        """
        name, kinds = self.config.name, self.traits.parents
        if parent is None:
            if "none" not in kinds:
                raise ArtifactError(f"method {name} starts from a {' or '.join(kinds)}; give its folder as parent")
            return
        if parent.kind not in kinds:
            raise ArtifactError(f"{parent.folder} is a {parent.kind}, and method {name} takes: {', '.join(kinds)}")
        self.check_parent(parent)
        # All differences are collected, so that one message names everything that has to change.
        fixed = [*ALWAYS, *(f for axis, fields in FIELDS.items() if axis not in self.traits.varies for f in fields)]
        differences = [
            f"{f} is {getattr(parent.arch, f)} in the parent, {getattr(target, f)} in the target"
            for f in fixed
            if getattr(target, f) != getattr(parent.arch, f)
        ]
        if differences:
            free = ", ".join(sorted(self.traits.varies))
            legal = f"may differ in {free} alone" if free else "has its parent's shape"
            raise ArtifactError(f"{parent.folder}: {', '.join(differences)}; with method {name} a target {legal}")

    def check_parent(self, parent: Artifact) -> None:
        """Check that this method accepts the parent's method. `ArtifactError` when it does not."""
        method = parent.method.get("name")
        if parent.kind == "learngene" and method not in self.from_methods:
            raise ArtifactError(f"{parent.folder} is a learngene of method {method}, and method {self.config.name} "
                                f"takes one of: {', '.join(self.from_methods)}")  # fmt: skip
        if parent.kind == "model" and "blocks.0.qkv.weight" not in parent.tensors:
            raise ArtifactError(f"{parent.folder} is a model of method {method} and not an ordinary DiT, and method "
                                f"{self.config.name} starts from ordinary DiTs")  # fmt: skip

    @property
    def from_methods(self) -> tuple[str, ...]:
        """Names of the methods whose learngenes this method accepts."""
        return (self.config.name,)

    def variants(self) -> dict[str, tuple[str, ...]]:
        """Settings that a family's grid may vary, with their legal values."""
        return {}

    def vary(self, axis: str, value: str) -> Method[MethodConfig]:
        """This method with one setting changed. `ConfigError` when it has no such axis or value."""
        axes = self.variants()
        if axis not in axes:
            has = nearest(axis, axes) if axes else "it has none"
            raise ConfigError(f"variants: method {self.config.name} has no axis {axis!r}; {has}")
        if value not in axes[axis]:
            raise ConfigError(f"variants.{axis}: {value!r} is unknown; {nearest(value, axes[axis])}")
        return type(self)(self.config.model_validate({**self.config.model_dump(), axis: value}))

    def shape_of(self, target: Arch, parent: Arch) -> Arch:
        """The target's architecture with the fields that the method determines."""
        return target

    def smallest(self, target: Arch) -> Arch:
        """The smallest target of the same kind, for checks that build one."""
        return target.with_depth(1) if "depth" in self.traits.varies else target

    # --- stages 1 and 2 ---------------------------------------------------------------------------------------------

    def auxiliary(self, arch: Arch) -> Arch:
        """The architecture that stage 1 trains for the `arch` of a config; some methods have their own depth.

        Raises:
            ConfigError: The method cannot condense this architecture.
        """
        return arch

    def given(self, ancestor: Arch | None, arch: Arch) -> Method[M]:
        """This method with settings filled in that depend on whether there is an ancestor.

        Args:
            ancestor: The ancestor's shape; none without an ancestor.
            arch: The shape of what stage 1 trains (`auxiliary`).
        """
        return self

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        """The initialized modules of stage 1 for this architecture. `ConfigError` for a method without stage 1."""
        raise ConfigError(f"method.name: {self.config.name} has no stage 1; train it directly with fine_dist.train")

    def carry_over(
        self, module: nn.Module, ancestor: DiT, generator: torch.Generator, device: torch.device
    ) -> dict[str, Any]:
        """Initialize stage 1 from the weights of an ancestor's blocks, for methods with `traits.carries_over`.

        It may take long, so it is called on one rank and once for a run directory.

        Args:
            module: `Condensation.module` of `condense`, in host memory.
            ancestor: The trained model, in host memory.
            generator: Seeded like the generator of `condense`.
            device: Device of the large products.

        Returns:
            Facts for the learngene's manifest (JSON).
        """
        return {}

    def blueprint(self, arch: Arch) -> nn.Module:
        """A module with the parameters of stage 1, for counting them; it may be on the meta device."""
        import torch

        return self.condense(arch, None, torch.Generator()).module

    @abstractmethod
    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        """Initialize a target that `check` has accepted."""

    def before_step(self, model: nn.Module) -> Callable[[int, torch.Generator], None] | None:
        """A hook that is called on every rank before each step of stage 2 with (step, generator seeded by both)."""
        return None

    # --- results ----------------------------------------------------------------------------------------------------

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        """A module of arbitrary values into which the tensors of a learngene or an unmerged target can be loaded."""
        from fine_dist.model.dit import DiT

        return DiT(arch)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of the ordinary dense DiT that computes the same function; every call gives the same bits."""
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def pack(self, model: nn.Module) -> SharedForm | None:
        """The shared form of a target with frozen genes, for a pack. None when it cannot be packed."""
        return None

    def cost(self, model: nn.Module, batch: int = 1) -> ModelCost:
        """FLOPs of a sample and the numbers saved for its backward pass, given what trains now; parameter counts."""
        from fine_dist.model.flops import model_cost

        return model_cost(model, batch)

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        """Tables [L, R] over depth by name, for figures and TensorBoard."""
        return {}


def needed(parent: Parent | None) -> Parent:
    """The parent of a method that requires one. `ArtifactError` without one, which `check` reports earlier."""
    if parent is None:
        raise ArtifactError("this method starts from a parent; give its folder")
    return parent
