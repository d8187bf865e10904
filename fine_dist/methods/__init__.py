"""The registry of methods: the settings of each, and the module of its code.

To add a method, write its settings (a `MethodConfig` in a module without torch) and its `Method` class, and add one
line to `_METHODS`. Settings are imported here, because every command's `--help` shows them. The code, which imports
torch, is imported by the first `METHODS[name]`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fine_dist.core.config import Config, union_of, validate
from fine_dist.core.errors import ArtifactError, ConfigError, nearest
from fine_dist.methods.adapters.config import BoftConfig, LoraConfig, OftConfig, PissaConfig, VeraConfig
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, Weights
from fine_dist.methods.fine.config import FineConfig
from fine_dist.methods.kind.config import KindConfig
from fine_dist.methods.ligo.config import LigoConfig
from fine_dist.methods.settings import (
    AutoLgConfig,
    CopiedShellConfig,
    DiffFitConfig,
    FrontConfig,
    HeurLgConfig,
    MimeticConfig,
    PrunedConfig,
    RandomGenesConfig,
    ScratchConfig,
    SvdConfig,
    SvdiffConfig,
    SweetConfig,
    SwsConfig,
    TlegConfig,
    WeightSelectionConfig,
)
from fine_dist.methods.stitching.config import LearngenePoolConfig, SnnetConfig
from fine_dist.methods.wave.config import WaveConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from fine_dist.model.arch import Arch
    from fine_dist.model.artifact import Artifact

_METHODS: dict[str, tuple[type[MethodConfig], str]] = {
    # name: (its settings, module and class of its code, below fine_dist.methods)
    "fine": (FineConfig, "fine.method:Fine"),
    "scratch": (ScratchConfig, "scratch:Scratch"),
    "copied_shell": (CopiedShellConfig, "copied_shell:CopiedShell"),
    "random_genes": (RandomGenesConfig, "random_genes:RandomGenes"),
    "auto_lg": (AutoLgConfig, "kept_blocks:AutoLg"),
    "boft": (BoftConfig, "adapters.method:Boft"),
    "difffit": (DiffFitConfig, "difffit:DiffFit"),
    "front": (FrontConfig, "front:Front"),
    "heur_lg": (HeurLgConfig, "kept_blocks:HeurLg"),
    "kind": (KindConfig, "kind.method:Kind"),
    "learngene_pool": (LearngenePoolConfig, "stitching.learngene_pool:LearngenePool"),
    "ligo": (LigoConfig, "ligo.method:Ligo"),
    "lora": (LoraConfig, "adapters.method:Lora"),
    "mimetic": (MimeticConfig, "mimetic:Mimetic"),
    "oft": (OftConfig, "adapters.method:Oft"),
    "pissa": (PissaConfig, "adapters.method:Pissa"),
    "pruned": (PrunedConfig, "pruned:Pruned"),
    "snnet": (SnnetConfig, "stitching.snnet:Snnet"),
    "svd": (SvdConfig, "svd:Svd"),
    "svdiff": (SvdiffConfig, "svdiff:Svdiff"),
    "sweet": (SweetConfig, "sweet:Sweet"),
    "sws": (SwsConfig, "sws:Sws"),
    "tleg": (TlegConfig, "tleg:Tleg"),
    "vera": (VeraConfig, "adapters.method:Vera"),
    "wave": (WaveConfig, "wave.method:Wave"),
    "weight_selection": (WeightSelectionConfig, "weight_selection:WeightSelection"),
}
ENTRY_POINTS = "fine_dist.methods"
"""Entry points by which other packages add methods: `my_method = "my_package.my_method:MyMethod"`."""
_INSTALLED: dict[str, type[Method[MethodConfig]]] = {}
"""Methods of other packages by name; they are imported at once, because only the class has the settings."""


def _add_methods_of_other_packages() -> None:
    for point in metadata.entry_points(group=ENTRY_POINTS):
        where = f"entry point {point.name} = {point.value!r} of {point.dist.name if point.dist else 'a package'}"
        if point.name in _METHODS:
            raise ConfigError(f"{where}: a method of that name exists; rename it, or uninstall the package")
        method = _class_of(point)
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise ConfigError(f"{where} is no subclass of fine_dist.methods.base.Method")
        _INSTALLED[point.name] = method
        _METHODS[point.name] = (method.Config, point.value)


def _class_of(point: metadata.EntryPoint) -> Any:
    """The object that an entry point names."""
    # A package that imports `methods.base` imports this file in the middle of its own import, when its class does not
    # exist yet. The half-imported module is dropped and imported again from the start; Python then returns that module
    # to the outer import as well.
    spec = getattr(sys.modules.get(point.module), "__spec__", None)
    if getattr(spec, "_initializing", False):
        del sys.modules[point.module]
    return point.load()


_add_methods_of_other_packages()
CONDENSING = ("fine", "kind", "learngene_pool", "snnet", "sweet", "sws", "tleg", "wave")
"""Methods that have a stage 1 (`Traits.condenses`), listed here so that the commands' help needs no torch."""


def described(names: Iterable[str] = tuple(_METHODS)) -> list[tuple[str, str]]:
    """(name, one-line description) of methods, for the help of commands."""
    return [(name, " ".join((_METHODS[name][0].__doc__ or "").split())) for name in names]


class _Registry(Mapping[str, "type[Method[MethodConfig]]"]):
    """Method classes by name; a class is imported when it is looked up."""

    def __getitem__(self, name: str) -> type[Method[MethodConfig]]:
        if name in _INSTALLED:
            return _INSTALLED[name]
        module, _, cls = _METHODS[name][1].partition(":")
        method: type[Method[MethodConfig]] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
        return method

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)

    def __contains__(self, name: object) -> bool:
        return name in _METHODS


METHODS: Mapping[str, type[Method[MethodConfig]]] = _Registry()
"""Every method's class by its name."""
CONFIGS: dict[str, type[MethodConfig]] = {name: config for name, (config, _) in _METHODS.items()}
"""Every method's settings by its name, without importing torch."""
AnyMethod = union_of(list(CONFIGS.values()))
"""Annotation of a config field that holds the settings of any one method."""
CONDENSES: MethodConfig = FineConfig()
"""Settings of the default method of stage 1."""
SCRATCH: MethodConfig = ScratchConfig()
"""Settings of training from scratch, which needs no parent."""


def build(config: MethodConfig) -> Method[MethodConfig]:
    """The method with these settings."""
    return METHODS[config.name](config)


def from_manifest(settings: dict[str, Any]) -> Method[MethodConfig]:
    """The method that an artifact's manifest names, with the settings in the manifest.

    Raises:
        ArtifactError: The manifest names a method that is not in the registry.
    """
    name = str(settings.get("name"))
    if name not in CONFIGS:
        raise ArtifactError(f"method {name!r} is unknown; {nearest(name, CONFIGS)}")
    return build(validate(CONFIGS[name], settings, "method in the manifest"))


def parent_of(artifact: Artifact) -> Parent:
    """An artifact together with a module of its method that has the artifact's tensors."""
    method = from_manifest(artifact.method)
    if artifact.kind != "learngene" and method.traits.dense:
        method = build(SCRATCH)
    return Parent(artifact, loaded(method, artifact.arch, artifact.tensors, artifact.folder))


def loaded(method: Method[Any], arch: Arch, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    """A module of a method with stored tensors.

    Raises:
        ArtifactError: Names, shapes or dtypes of the tensors do not fit the method; the message names `folder`.
    """
    try:
        module = method.module(arch, tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder}: its tensors do not fit method {method.config.name} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): it was altered; copy the folder again"
        ) from None
    wanted = module.state_dict()
    for name, tensor in tensors.items():
        # `load_state_dict` silently copies integers into floats, and a scalar into a vector of one number.
        if name in wanted and (
            tensor.is_floating_point() != wanted[name].is_floating_point() or tensor.shape != wanted[name].shape
        ):
            raise ArtifactError(
                f"{folder}: {name} is {tensor.dtype} {list(tensor.shape)}, and {wanted[name].dtype} "
                f"{list(wanted[name].shape)} by the manifest: one of them was altered; copy the folder again"
            )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{folder}: its tensors are not those of its manifest: {reason}") from None
    return module


def check(method: Method[MethodConfig], parent: Artifact | None, target: Arch) -> None:
    """As `Method.check`; the error also names the methods that could make this target from this parent."""
    try:
        method.check(parent, target)
    except ArtifactError as error:
        able = [name for name in METHODS if name != method.config.name and _could(name, parent, target)]
        raise ArtifactError(f"{error}; methods that could: {', '.join(able)}" if able else str(error)) from None


def _could(name: str, parent: Artifact | None, target: Arch) -> bool:
    try:
        build(CONFIGS[name](name=name)).check(parent, target)
    except ArtifactError:
        return False
    return True


__all__ = [
    "CONDENSES",
    "CONFIGS",
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
