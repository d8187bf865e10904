"""Settings of a family of targets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.config import Config, Depth, PathKey, Seed
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.settings import LoopConfig, OptimConfig
from fine_dist.family.packing import EarlyStop, PackConfig
from fine_dist.methods import AnyMethod
from fine_dist.model.arch import Arch


class DomainConfig(Config):
    """A data set that targets are initialized on."""

    data: DataConfig = DataConfig()
    """Its shards, and held-out shards that are never trained on."""
    labels: Literal["same", "keep", "new"] = "same"
    """`same`: its classes are the parent's, which is checked by class names or their number. `keep`: use the labels as
    they are, unchecked. `new`: each target trains a label embedder of its own."""


class InitConfig(Config):
    """Stage 2: initialize a family of targets, depths x data sets x seeds x learning rates x variants, from one parent.

    Targets that share frozen genes are packed: they train as one program, whatever their depth, data, seed and rate.
    """

    run_dir: PathKey = "runs/init"
    """Folder of the family; every target gets a folder in it."""
    parent: PathKey | None = None
    """What targets are made from: a learngene, a model or a run directory of ours, or another project's model (DiT's
    `.pt`, a folder of diffusers, a name on the hub). Default: none, for a method that starts from nothing."""
    hints: HintsConfig = HintsConfig()
    """Facts about another project's model that its file does not hold."""
    method: AnyMethod | None = None
    """How targets are made. Default: the method that the parent was condensed with."""
    arch: Arch | None = None
    """Shape of the targets, apart from their depth. Default: the parent's. What is left open of latents and classes is
    taken from the shards."""
    depths: tuple[Depth, ...] = (4, 6, 8, 10, 12)
    """Layers of the targets: one target for each, in every combination with the other axes."""
    data: DataConfig = DataConfig()
    """The data set, where there is only one."""
    labels: Literal["same", "keep", "new"] = "same"
    """What labels of `data` mean: see `domains.NAME.labels`."""
    domains: dict[str, DomainConfig] = Field(default_factory=dict)
    """Several data sets by name, each with `data` and `labels`; `data` above is not read then."""
    seeds: tuple[Seed, ...] = (0,)
    """Random seeds: each sets the order of the data, the noise, and the random part of one target's initialization."""
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Learning rates to sweep. Default: `optim.lr` alone."""
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Settings of the method to sweep, by name, such as `sigma: [segment, linear]`. Default: as it is set."""
    steps: int = Field(300, ge=1, le=1_000_000_000)
    """Updates of each target. A few hundred are enough where only scalers train."""
    batch: int = Field(64, ge=1, le=2**20)
    """Samples of an update of one target, over all processes."""
    stop: EarlyStop | None = None
    """Ends a target early when its loss no longer falls. Default: never."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process; it must be the parent's."""
    optim: OptimConfig = OptimConfig(lr=1e-2)
    """Optimizer of what trains. Scalers want a larger rate than weights: 1e-2 to 3e-2."""
    engine: LoopConfig = LoopConfig(checkpoint_every=100, log_every=25, eval_every=150)
    """Device, precision, checkpoints and logs."""
    pack: PackConfig = PackConfig()
    """How targets are packed; it changes speed and memory, not results."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of a pack's job, where it is submitted."""
    baselines: tuple[PathKey, ...] = ()
    """Run directories whose held-out losses are drawn beside the family's in family.png, such as models trained from
    scratch."""
    limit: int = Field(200, ge=1, le=1_000_000)
    """Largest number of targets that is run without `yes`, because lists multiply quickly."""
    yes: bool = False
    """Run a grid of more than `limit` targets."""
    only: tuple[str, ...] = ()
    """Names of the targets to run. Default: all of the grid."""
