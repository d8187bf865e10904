"""The registry of methods: each one's settings, and where its code is.

To add a method, write its settings (a `MethodConfig` in a module without torch) and its `Method` class, and add one
line to `_METHODS`. Settings are imported here, because every command's `--help` shows them; the code, which imports
torch, is imported when `METHODS[name]` is first asked for it.
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
_OTHERS: dict[str, type[Method[MethodConfig]]] = {}


def _add_methods_of_other_packages() -> None:
    for point in metadata.entry_points(group=ENTRY_POINTS):
        where = f"entry point {point.name} = {point.value!r} of {point.dist.name if point.dist else 'a package'}"
        if point.name in _METHODS:
            raise ConfigError(f"{where}: a method of that name exists; rename it, or uninstall the package")
        found = _class_of(point)
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ConfigError(f"{where} is no subclass of fine_dist.methods.base.Method")
        _OTHERS[point.name] = found
        _METHODS[point.name] = (found.Config, point.value)


def _class_of(point: metadata.EntryPoint) -> Any:
    """What an entry point names."""
    # A package that is imported first imports `methods.base`, and so this file, in the middle of its own import: its
    # class is not there yet. It is imported once more, whole; Python then hands out that module, here and there.
    spec = getattr(sys.modules.get(point.module), "__spec__", None)
    if getattr(spec, "_initializing", False):
        del sys.modules[point.module]
    return point.load()


_add_methods_of_other_packages()
CONDENSING = ("fine", "kind", "learngene_pool", "snnet", "sweet", "sws", "tleg", "wave")
"""Methods that have a stage 1 (`Traits.condenses`), known without importing their code."""


def described(names: Iterable[str] = tuple(_METHODS)) -> list[tuple[str, str]]:
    """Methods by name with one line about each, for the help of commands."""
    return [(name, " ".join((_METHODS[name][0].__doc__ or "").split())) for name in names]


class _Registry(Mapping[str, "type[Method[MethodConfig]]"]):
    """Method classes by name; a class is imported when it is looked up."""

    def __getitem__(self, name: str) -> type[Method[MethodConfig]]:
        if name in _OTHERS:
            return _OTHERS[name]
        module, _, cls = _METHODS[name][1].partition(":")
        found: type[Method[MethodConfig]] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
        return found

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
"""The default method of stage 1."""
SCRATCH: MethodConfig = ScratchConfig()
"""The method that needs no parent."""


def build(config: MethodConfig) -> Method[MethodConfig]:
    """The method that these settings are for."""
    return METHODS[config.name](config)


def from_manifest(settings: dict[str, Any]) -> Method[MethodConfig]:
    """The method that an artifact's manifest names, with the settings it was made with.

    Raises:
        ArtifactError: The manifest names a method that is not in the registry.
    """
    name = str(settings.get("name"))
    if name not in CONFIGS:
        raise ArtifactError(f"method {name!r} is not known here; {nearest(name, CONFIGS)}")
    return build(validate(CONFIGS[name], settings, "method in the manifest"))


def parent_of(artifact: Artifact) -> Parent:
    """An artifact together with a module of the method that made it, in which its tensors are loaded."""
    method = from_manifest(artifact.method)
    if artifact.kind != "learngene" and method.traits.dense:
        method = build(SCRATCH)
    return Parent(artifact, loaded(method, artifact.arch, artifact.tensors, artifact.folder))


def loaded(method: Method[Any], arch: Arch, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    """A module of a method with stored tensors in it.

    Raises:
        ArtifactError: Names, shapes or kinds of the tensors are not those of the method; `folder` is named.
    """
    try:
        module = method.module(arch, tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder}: its tensors do not make a module of {method.config.name} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): it was altered; copy the folder again"
        ) from None
    wanted = module.state_dict()
    for name, tensor in tensors.items():
        # torch copies integers into floats, and a number without dimensions into a vector of one, without a word.
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
        raise ArtifactError(f"{folder} does not hold what its manifest says: {reason}") from None
    return module


def check(method: Method[MethodConfig], parent: Artifact | None, target: Arch) -> None:
    """`Method.check`, whose error also names the methods that could make this target from this parent."""
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
