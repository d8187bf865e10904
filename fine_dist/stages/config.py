"""Settings that the stages which train share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_dist.core.config import MAX_DEPTH, Config, PathKey, Seed, expand_path, validate
from fine_dist.core.errors import ConfigError, DataError
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.evaluation.settings import QuickConfig

if TYPE_CHECKING:
    from torch import nn

    from fine_dist.methods.base import Method
    from fine_dist.model.arch import Arch

PRELOAD = (
    "torch.utils.tensorboard",
    "fine_dist.engine.loop",
    "fine_dist.data.stream",
    "fine_dist.diffusion.samplers",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
)
"""What a local pool imports once for all jobs of a stage that trains."""
BOUND = ("precision", "on_bad_loss", "ema_decay", "ema_warmup")
"""Engine settings that change what is computed."""


@dataclass(frozen=True)
class Blueprint:
    """A stage's model without memory for its weights: what counts and estimates are made from."""

    arch: Arch
    """Shape of what the stage keeps."""
    model: nn.Module
    """On the meta device."""
    method: Method[Any]
    teacher: Arch | None = None
    """A frozen model that is asked at every step."""


class StageConfig(Config):
    """Settings of a stage that trains."""

    run_dir: PathKey = "runs/run"
    """Folder of everything that the run writes. The same command again continues what is there."""
    seed: Seed = 0
    """Seeds the initialization, the order of the data, times, noise and dropped labels."""
    steps: int = Field(1000, ge=1, le=1_000_000_000)
    """Updates in all. A finished run continues when it is started again with more."""
    batch: int = Field(64, ge=1, le=2**20)
    """Samples of an update, over all processes and micro-batches."""
    data: DataConfig = DataConfig()
    """Shards of latents to train on, and held-out shards that are only measured on."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process that the model learns; it must be that of the parent or ancestor."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule of the learning rate."""
    engine: EngineConfig = EngineConfig()
    """Device, precision, checkpoints, averages and logs."""
    sampler: SamplerConfig = SamplerConfig()
    """How previews in TensorBoard and quick evaluations are sampled."""
    vae: PathKey | None = None
    """Folder or hub name of the `AutoencoderKL` that decodes those pictures, and what a quick evaluation draws."""
    quick: QuickConfig = QuickConfig()
    """Scores of samples while the model trains."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job, where it is submitted."""
    keep_labels: bool = False
    """Use labels of the data as the parent's classes of the same numbers, although class names or their number differ.
    Default: refuse, because label 0 of the data would continue as class 0 of the parent, whatever that shows."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """What this run comes from, by hashes and settings: its own part of `identity`."""

    def identity(self) -> dict[str, Any]:
        """What must match for a run to be the same run, whatever it is called and wherever things lie (JSON values).

        Steps may grow, unless the schedule of the learning rate depends on how many there are. `DataError` for shards
        that are not there, `ArtifactError` for a parent that is not.
        """
        from fine_dist.data.reader import ShardSet

        if self.data.shards is None:
            raise ConfigError("data.shards is not set: give the folder that `fine-dist encode` wrote")
        shards = ShardSet(expand_path(self.data.shards), self.data)
        found = {
            **self.origin(),
            "data": {"hash": shards.manifest.hash, "streams": self.data.streams, "window": self.data.window},
            "seed": self.seed,
            "batch": self.batch,
            "optim": self.optim.model_dump(mode="json"),
            "diffusion": self.diffusion.model_dump(mode="json"),
            "engine": {key: getattr(self.engine, key) for key in BOUND},
        }
        shards.close()
        return {**found, "steps": self.steps} if self.optim.depends_on_steps else found

    @abstractmethod
    def blueprint(self) -> Blueprint | None:
        """What would be trained; none while its shape is not known."""


def fit_arch(arch: Arch, data: DataConfig) -> Arch:
    """An architecture whose latent shape and number of classes are those of the shards, where it does not give them.

    Without shards, or where they are not there yet, it stays as it is.
    """
    unset = {"in_channels", "input_size", "num_classes"} - arch.model_fields_set
    if not (unset and data.shards):
        return arch
    from fine_dist.data.sources import locate
    from fine_dist.model.arch import Arch

    try:
        manifest, _ = locate(expand_path(data.shards), data)
    except DataError:
        return arch  # the run itself says what is wrong with them
    channels, side, _ = manifest.latent_shape
    known = {"in_channels": channels, "input_size": side, "num_classes": manifest.num_classes}
    given = {key: getattr(arch, key) for key in arch.model_fields_set}
    return validate(Arch, {**given, **{key: known[key] for key in unset}}, "arch of the shards")


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
    from fine_dist.data.shards import check_classes
    from fine_dist.data.sources import locate

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


class LossConfig(Config):
    """Weights of the terms of stage 1's loss; none: what the method says."""

    diffusion: float | None = Field(None, ge=0)
    """Noise prediction; 0 is pure distillation."""
    output: float | None = Field(None, ge=0)
    """Mean squared difference to the ancestor's full output."""
    features: float | None = Field(None, ge=0)
    """Mean squared difference to features of the ancestor's blocks, where the method names some."""
    repa: float = Field(0.0, ge=0)
    """Weight of REPA's alignment with an image encoder (arXiv 2410.06940), whose paper uses 0.5; 0 leaves it out. It
    runs the encoder at every step, and the VAE before it where latents are not images."""
    repa_encoder: str | None = None
    """Local transformers folder of the DINOv2 whose tokens are aligned with; REPA needs it."""
    repa_block: int | None = Field(None, ge=1, le=MAX_DEPTH)
    """Number of the block, counted from 1, whose output is aligned. Default: the one at 8/28 of the depth, as in the
    paper."""
    repa_width: int = Field(2048, ge=1, le=65_536)
    """Width of the projector's hidden layers, which train beside the model and are dropped at the end."""

    def repa_identity(self) -> dict[str, Any]:
        """What of REPA changes a run, wherever the encoder lies; JSON."""
        return self.model_dump(include={"repa", "repa_block", "repa_width"})
