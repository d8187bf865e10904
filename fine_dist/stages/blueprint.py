"""A training stage from its settings alone: its model without weights, and the identity of its run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from fine_dist.core.config import expand_path, validate
from fine_dist.core.errors import ConfigError, DataError
from fine_dist.data.manifest import check_classes
from fine_dist.data.reader import ShardSet
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import locate
from fine_dist.methods.base import Method, MethodConfig, Weights
from fine_dist.model.arch import Arch, sides
from fine_dist.stages.settings import StageConfig

BOUND = ("precision", "residual_dtype", "on_bad_loss", "ema_decay", "ema_warmup")
"""Engine settings that change what is computed."""

C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Blueprint:
    """A stage's model on the meta device, for counting parameters and estimating cost."""

    arch: Arch
    """Architecture of the model that the stage saves."""
    model: nn.Module
    """On the meta device."""
    method: Method[MethodConfig]
    teacher: Arch | None = None
    """Architecture of a frozen teacher that runs at every step; None without one."""


class Stage(ABC, Generic[C]):
    """A training stage with its settings.

    Attributes:
        config: The settings. Fields of `arch` that are not given are taken from the shards.
    """

    kind: ClassVar[str]
    """Kind of the run: `condense` or `train`."""
    product: ClassVar[str]
    """Kind of the resulting artifact, which is also its folder in the run directory."""

    def __init__(self, config: C) -> None:
        arch = self.configured_arch(config)
        self.config = config.model_copy(update={"arch": fit_arch(arch, config.data)}) if arch else config

    @abstractmethod
    def configured_arch(self, config: C) -> Arch | None:
        """The architecture in the settings. None: it is that of another model."""

    @property
    @abstractmethod
    def weights(self) -> Weights:
        """Weights of the loss terms."""

    @property
    def imitates(self) -> bool:
        """Whether a loss term imitates the ancestor."""
        return self.weights.output > 0 or self.weights.features > 0

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """The stage's own part of `identity`: hashes and settings of what the run starts from."""

    @abstractmethod
    def blueprint(self) -> Blueprint | None:
        """The model that would be trained; None while its architecture is unknown."""

    def identity(self) -> dict[str, Any]:
        """Values that must match when a run resumes (JSON), without names and paths.

        The number of steps may grow, unless the learning-rate schedule depends on it.

        Raises:
            DataError: The shards do not exist.
            ArtifactError: The parent or ancestor does not exist.
        """
        config = self.config
        if config.data.shards is None:
            raise ConfigError("data.shards is not set: give the folder that `fine-dist encode` wrote")
        shards = ShardSet(expand_path(config.data.shards), config.data)
        values = {
            **self.origin(),
            "data": {"hash": shards.manifest.hash, "streams": config.data.streams, "window": config.data.window},
            "seed": config.seed,
            "batch": config.batch,
            "optim": config.optim.model_dump(mode="json"),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "engine": {key: getattr(config.engine, key) for key in BOUND},
        }
        shards.close()
        return {**values, "steps": config.steps} if config.optim.depends_on_steps else values


def hparams(stage: str, method: MethodConfig, arch: Arch, config: Any, *, seed: int, lr: float) -> dict[str, Any]:
    """Settings for the trackers' table of runs, with the same names in every stage.

    Args:
        config: Settings with `batch`, `steps` and `engine`.
    """
    return {
        **{"stage": stage, "method": method.name, "architecture": arch.name, "depth": arch.num_layers},
        **{"batch": config.batch, "steps": config.steps, "seed": seed, "lr": lr, "precision": config.engine.precision},
        **{f"method.{key}": value for key, value in method.model_dump(mode="json", exclude={"name"}).items()},
    }


def fit_arch(arch: Arch, data: DataConfig) -> Arch:
    """Fill in the latent shape and the number of classes from the shards, where the architecture does not give them.

    Without shards, or if they do not exist yet, the architecture is returned unchanged.
    """
    unset = {"in_channels", "input_size", "num_classes"} - arch.model_fields_set
    if not (unset and data.shards):
        return arch
    try:
        manifest, _ = locate(expand_path(data.shards), data)
    except DataError:
        return arch  # the run itself says what is wrong with them
    channels, height, width = manifest.latent_shape
    known = {"in_channels": channels, "input_size": sides(height, width), "num_classes": manifest.num_classes}
    stated = {key: getattr(arch, key) for key in arch.model_fields_set}
    return validate(Arch, {**stated, **{key: known[key] for key in unset}}, "arch of the shards")


def check_labels(
    names: Sequence[str], num_classes: int, parent: str, data: DataConfig, *, keep_labels: bool, remedy: str
) -> None:
    """Check that the labels of the data mean the parent's classes.

    Args:
        names: The parent's class names in the order of labels; empty if unknown.
        num_classes: Number of the parent's classes.
        parent: Name of the parent, for messages.
        data: The data. Class names are compared if both sides have them, else the number of classes.
        keep_labels: Whether the user has asked to use the labels as they are; nothing is checked then.
        remedy: The remedy in the message.

    Raises:
        DataError: The classes differ.
    """
    if keep_labels or not data.shards:
        return
    where = expand_path(data.shards)
    manifest, _ = locate(where, data)
    if names and manifest.class_names:
        try:
            check_classes(parent, tuple(names), where, manifest.class_names)
        except DataError as error:
            raise DataError(f"{str(error).partition(';')[0]}; {remedy}") from None
    elif manifest.num_classes != num_classes:
        raise DataError(
            f"{parent} knows {num_classes} classes, and {where} has {manifest.num_classes}: label 0 of the data would "
            f"continue as the parent's class 0; {remedy}"
        )
