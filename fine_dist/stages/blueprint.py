"""What a stage trains, and what makes it the same run, from its settings alone: nothing is trained or written."""

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
    """A stage's model without memory for its weights: what counts and estimates are made from."""

    arch: Arch
    """Shape of what the stage keeps."""
    model: nn.Module
    """On the meta device."""
    method: Method[MethodConfig]
    teacher: Arch | None = None
    """A frozen model that is asked at every step."""


class Stage(ABC, Generic[C]):
    """A stage that trains, with its settings.

    Attributes:
        config: The settings. What `arch` leaves open is taken from the shards.
    """

    kind: ClassVar[str]
    """What runs: `condense` or `train`."""
    product: ClassVar[str]
    """Kind of the artifact that it makes, and the artifact's folder in the run directory."""

    def __init__(self, config: C) -> None:
        arch = self.configured_arch(config)
        self.config = config.model_copy(update={"arch": fit_arch(arch, config.data)}) if arch else config

    @abstractmethod
    def configured_arch(self, config: C) -> Arch | None:
        """The architecture that the settings name. None where it is another model's."""

    @property
    @abstractmethod
    def weights(self) -> Weights:
        """Weights of the loss's terms."""

    @property
    def imitates(self) -> bool:
        """Whether a term of the loss imitates the ancestor."""
        return self.weights.output > 0 or self.weights.features > 0

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What this run comes from, by hashes and settings: its own part of `identity`."""

    @abstractmethod
    def blueprint(self) -> Blueprint | None:
        """What would be trained; none while its shape is not known."""

    def identity(self) -> dict[str, Any]:
        """What must match for a run to be the same run, whatever it is called and wherever things lie (JSON values).

        Steps may grow, unless the schedule of the learning rate depends on how many there are. `DataError` for shards
        that are not there, `ArtifactError` for a parent that is not.
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
    """The settings of a run that trackers show in a table of runs, under the same names in every stage.

    Args:
        config: Settings with `batch`, `steps` and `engine`.
    """
    return {
        **{"stage": stage, "method": method.name, "architecture": arch.name, "depth": arch.num_layers},
        **{"batch": config.batch, "steps": config.steps, "seed": seed, "lr": lr, "precision": config.engine.precision},
        **{f"method.{key}": value for key, value in method.model_dump(mode="json", exclude={"name"}).items()},
    }


def fit_arch(arch: Arch, data: DataConfig) -> Arch:
    """An architecture whose latent shape and number of classes are those of the shards, where it does not give them.

    Without shards, or where they are not there yet, it stays as it is.
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
    names: Sequence[str], num_classes: int, parent: str, data: DataConfig, *, kept: bool, remedy: str
) -> None:
    """Refuse data whose labels mean other classes than the parent's.

    Args:
        names: The parent's class names, in the order of labels; empty where nothing tells.
        num_classes: The parent's classes.
        parent: What the parent is called.
        data: Its shards are compared: by class names where both sides have them, else by the number of classes.
        kept: Whether the user wants the labels to be used as they are.
        remedy: Which settings the message names.

    Raises:
        DataError: The classes differ.
    """
    if kept or not data.shards:
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
