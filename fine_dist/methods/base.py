"""What a method is: a rule that turns shared genes and a layer's own scalers into that layer's weights.

Settings (`MethodConfig`) lie in modules without torch, because every command's `--help` shows them; the code of a
method is a `Method` in a file of its own, or in a folder with the layers it owns. `methods/__init__.py` lists both.
Whatever the rest of the package needs to know of a method it asks here: what a target may come from, what stage 1
trains and on which loss, what trains next, how the result becomes an ordinary model, what it costs, what can be drawn.
The defaults are those of a baseline that condenses nothing. Three defaults import torch late, because the modules of
settings import this one.
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
    """Settings every method has."""

    name: str
    """Which method."""


M = TypeVar("M", bound=MethodConfig)

Varies = Literal["depth", "width", "classes", "resolution"]
ALWAYS = ("patch_size", "in_channels", "learn_sigma")
"""What a target shares with its parent whatever the method."""
RESOLUTION = ("input_size", "position_grid")
WIDTH = ("hidden_size", "num_heads")


@dataclass(frozen=True)
class Weights:
    """How much each term of stage 1's loss counts; 0 leaves it out."""

    diffusion: float = 1.0
    output: float = 0.0
    """Mean squared difference to the teacher's full output."""
    features: float = 0.0
    """The same of its blocks' features, for the pairs that the condensation names."""


@dataclass(frozen=True)
class Traits:
    """What a method can do, said before anything is built."""

    parents: tuple[Literal["none", "learngene", "model"], ...] = ("none",)
    """What a target may come from."""
    varies: frozenset[Varies] = frozenset({"depth", "width", "classes"})
    """In what a target may differ from its parent."""
    condenses: bool = False
    """Whether it has a stage 1."""
    ancestor: Literal["no", "may", "must"] = "no"
    """Whether stage 1 starts from, or imitates, a trained model."""
    same_shape: bool = False
    """Whether that model must have the very shape of what stage 1 trains (else: its latent shape and classes)."""
    carries_over: bool = False
    """Whether stage 1 starts from the weights of that model's blocks (`Method.carry_over`)."""
    loss: Weights = Weights()
    """Weights of the terms of stage 1's loss, unless the user sets them. Where a model is given to a method that can do
    without, stage 1 imitates its output as well, with weight 1."""
    dense: bool = True
    """Whether the product is an ordinary DiT; else it saves and loads as itself."""
    samples: int = 0
    """Samples of the target's data that `descend` looks at, where there are data."""


@dataclass(frozen=True)
class Parent:
    """What a target comes from: its artifact, and a module of its own method with these tensors in it."""

    artifact: Artifact
    module: nn.Module
    samples: tuple[Tensor, Tensor] | None = None
    """Latents [N, C, H, H] of the target's data and labels [N] that the parent knows (the null label where its classes
    are others), for a method that looks at some (`Traits.samples`)."""

    @property
    def arch(self) -> Arch:
        return self.artifact.arch


@dataclass
class Condensation:
    """What stage 1 trains.

    module:      trained as a whole; `(z, t, y) -> output`, or an `ModelOutput` with features.
    pairs:       (feature of `module`, feature of the teacher) for the features' term.
    before_step: called on every rank before each step with the step and a generator seeded by (seed, step).
    report:      what is worth keeping of how it began (JSON), and `lines`, the same to be printed.
    prefix:      where what is kept lies in `module`, as a prefix of state-dict names; empty: all of it.
    """

    module: nn.Module
    pairs: Sequence[tuple[str, str]] = ()
    before_step: Callable[[int, torch.Generator], None] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()
    prefix: str = ""

    def product(self, module: nn.Module) -> nn.Module:
        """What is kept of a (copy of the) trained module."""
        return module.get_submodule(self.prefix.rstrip(".")) if self.prefix else module


@dataclass
class Descent:
    """A target before any training of its own, and what trains next.

    trains: `nothing` (it is ready), `some` (its parameters with `requires_grad`) or `all`.
    """

    model: nn.Module
    trains: Literal["nothing", "some", "all"] = "nothing"


class Method(ABC, Generic[M]):
    """One way to initialise targets.

    Config: its settings.  label: what tables call it.  paper: where it comes from.  summary: one line for lists.
    """

    Config: ClassVar[type[MethodConfig]]
    label: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    tables_of: ClassVar[str] = ""
    """What the tables of `tables` show, as a title: a method that draws none has none."""

    def __init__(self, config: M):
        self.config = config

    # --- what it can do ---------------------------------------------------------------------------------------------

    @property
    def traits(self) -> Traits:
        """By these settings."""
        return Traits()

    def check(self, parent: Artifact | None, target: Arch) -> None:
        """`ArtifactError` with the reason when no target of this shape can come from this parent. Builds nothing."""
        name, kinds = self.config.name, self.traits.parents
        if parent is None:
            if "none" not in kinds:
                raise ArtifactError(f"method {name} starts from a {' or '.join(kinds)}; give its folder as parent")
            return
        if parent.kind not in kinds:
            raise ArtifactError(f"{parent.folder} is a {parent.kind}, and method {name} takes: {', '.join(kinds)}")
        self.check_parent(parent)
        differs = [f for f in ALWAYS if _differ(target, parent.arch, f)]
        differs += (
            [] if "resolution" in self.traits.varies else [f for f in RESOLUTION if _differ(target, parent.arch, f)]
        )
        differs += [] if "width" in self.traits.varies else [f for f in WIDTH if _differ(target, parent.arch, f)]
        differs += (
            [] if "classes" in self.traits.varies else ["num_classes"] * _differ(target, parent.arch, "num_classes")
        )
        differs += [] if "depth" in self.traits.varies else ["num_layers"] * _differ(target, parent.arch, "num_layers")
        if differs:
            said = ", ".join(
                f"{f} is {getattr(parent.arch, f)} in the parent, {getattr(target, f)} in the target" for f in differs
            )
            free = ", ".join(sorted(self.traits.varies)) or "nothing"
            raise ArtifactError(f"{parent.folder}: {said}; with method {name} a target may differ in {free} alone")

    def check_parent(self, parent: Artifact) -> None:
        """`ArtifactError` when the parent was made by a method that this one cannot go on from."""
        if parent.kind == "learngene" and parent.method.get("name") not in self.from_methods:
            made = parent.method.get("name")
            raise ArtifactError(f"{parent.folder} is a learngene of method {made}, and method {self.config.name} "
                                f"takes one of: {', '.join(self.from_methods)}")  # fmt: skip
        if parent.kind == "model" and "blocks.0.qkv.weight" not in parent.tensors:
            made = parent.method.get("name")
            raise ArtifactError(f"{parent.folder} is a model of method {made} and no ordinary DiT, and method "
                                f"{self.config.name} goes on from ordinary ones")  # fmt: skip

    @property
    def from_methods(self) -> tuple[str, ...]:
        """Methods whose learngenes this one takes."""
        return (self.config.name,)

    def variants(self) -> dict[str, tuple[str, ...]]:
        """Axes that a family's grid may add: a setting's name -> its legal values."""
        return {}

    def vary(self, axis: str, value: str) -> Method[Any]:
        """The same method with one setting changed. `ConfigError` for an axis or value that it does not have."""
        axes = self.variants()
        if axis not in axes:
            has = nearest(axis, axes) if axes else "it has none"
            raise ConfigError(f"variants: method {self.config.name} has no axis {axis!r}; {has}")
        if value not in axes[axis]:
            raise ConfigError(f"variants.{axis}: {value!r} is none of them; {nearest(value, axes[axis])}")
        return type(self)(self.config.model_validate({**self.config.model_dump(), axis: value}))

    def shape_of(self, target: Arch, parent: Arch) -> Arch:
        """The target's shape with what the method settles of it beyond what is asked for."""
        return target

    def smallest(self, target: Arch) -> Arch:
        """The least target of the same sort, to be built where its sort alone matters."""
        return target.with_depth(1) if "depth" in self.traits.varies else target

    # --- stages 1 and 2 ---------------------------------------------------------------------------------------------

    def auxiliary(self, arch: Arch) -> Arch:
        """The shape of what stage 1 trains and keeps, where a config names `arch`: a method may set the depth itself,
        whatever the ancestor's is. `ConfigError` for a shape that it cannot condense."""
        return arch

    def given(self, ancestor: Arch | None, arch: Arch) -> Method[M]:
        """This method with settings filled in that depend on whether there is an ancestor.

        Args:
            ancestor: The ancestor's shape; none without an ancestor.
            arch: The shape of what stage 1 trains (`auxiliary`).
        """
        return self

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        """What stage 1 trains for this architecture (`auxiliary` of it), built and begun. Only for methods that
        condense."""
        raise ConfigError(f"method.name: {self.config.name} has no stage 1; train it directly with fine_dist.train")

    def carry_over(
        self, module: nn.Module, ancestor: DiT, generator: torch.Generator, device: torch.device
    ) -> dict[str, Any]:
        """Set stage 1's start from the weights of an ancestor's blocks, where `traits.carries_over`.

        It may take long, so it is called on one rank, once in the life of a run directory.

        Args:
            module: What `condense` has made, in host memory.
            ancestor: The trained model, in host memory.
            generator: Seeded like that of `condense`.
            device: Where large products are computed.

        Returns:
            What the learngene's manifest keeps of it (JSON).
        """
        return {}

    def blueprint(self, arch: Arch) -> nn.Module:
        """A module of stage 1's shape (`auxiliary`), for counting: it may be made on the meta device, and its values do
        not matter."""
        import torch

        return self.condense(arch, None, torch.Generator()).module

    @abstractmethod
    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        """A target that `check` has let pass, before any training of its own."""

    def before_step(self, model: nn.Module) -> Callable[[int, torch.Generator], None] | None:
        """Called on every rank before each step that trains a target, with a generator seeded by (seed, step)."""
        return None

    # --- what becomes of it -----------------------------------------------------------------------------------------

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        """A module of whatever values that a learngene's or an unmerged target's tensors load into."""
        from fine_dist.model.dit import DiT

        return DiT(arch)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of an ordinary dense DiT of the same function, the same bits every time."""
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def pack(self, model: nn.Module) -> SharedForm | None:
        """The target as a pack takes it, where its genes are frozen and shared; none where it trains by itself."""
        return None

    def cost(self, model: nn.Module, batch: int = 1) -> ModelCost:
        """FLOPs and kept numbers of a step as things train now, and numbers stored and trained."""
        from fine_dist.model.flops import model_cost

        return model_cost(model, batch)

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        """What is worth drawing over depth: [L, R] tables by name."""
        return {}


def _differ(a: Arch, b: Arch, field_name: str) -> bool:
    return bool(getattr(a, field_name) != getattr(b, field_name))


def needed(parent: Parent | None) -> Parent:
    """The parent of a method that must have one; `check` has said so before."""
    if parent is None:
        raise ArtifactError("this method starts from a parent; give its folder")
    return parent
