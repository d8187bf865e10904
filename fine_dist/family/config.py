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
    """Shards to train on, and held-out shards that are never trained on."""
    labels: Literal["same", "keep", "new"] = "same"
    """Meaning of the labels. `same`: the classes are the parent's, which is checked by class names or their number.
    `keep`: the labels are used without a check. `new`: each target trains its own label embedder."""


class InitConfig(Config):
    """Stage 2: initialize a family of targets, depths x data sets x seeds x learning rates x variants, from one parent.

    Targets that share frozen genes are packed: they train as one program, whatever their depth, data, seed and rate.
    """

    run_dir: PathKey = "runs/init"
    """Run directory of the family; every target gets a folder in it."""
    parent: PathKey | None = None
    """Model that targets are initialized from: a learngene, a model or a run directory of this project, or another
    project's model (DiT's `.pt`, a diffusers folder, a name on the hub). Default: none, for methods that need none."""
    hints: HintsConfig = HintsConfig()
    """Facts about another project's model that its file does not contain."""
    method: AnyMethod | None = None
    """Initialization method. Default: the method that the parent was condensed with."""
    arch: Arch | None = None
    """Architecture of the targets without their depth. Default: the parent's. Unset fields of latents and classes are
    read from the shards."""
    depths: tuple[Depth, ...] = (4, 6, 8, 10, 12)
    """Layers of the targets: one target for each depth, in every combination with the other axes."""
    data: DataConfig = DataConfig()
    """Data set of all targets. Use `domains` for several data sets."""
    labels: Literal["same", "keep", "new"] = "same"
    """Meaning of the labels of `data`, as in `domains.NAME.labels`."""
    domains: dict[str, DomainConfig] = Field(default_factory=dict)
    """Several data sets by name, each with `data` and `labels`; the top-level `data` is then ignored."""
    seeds: tuple[Seed, ...] = (0,)
    """Random seeds: each sets the order of the data, the noise, and the random part of one target's initialization."""
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Learning rates to sweep. Default: only `optim.lr`."""
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Settings of the method to sweep, by name, such as `sigma: [segment, linear]`. Default: the value in `method`."""
    steps: int = Field(300, ge=1, le=1_000_000_000)
    """Optimizer updates of each target. A few hundred are enough if only scalers train."""
    batch: int = Field(64, ge=1, le=2**20)
    """Samples in an update of one target, over all processes."""
    stop: EarlyStop | None = None
    """Rule that ends a target early when its loss no longer falls. Default: no early stop."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process; it must be the parent's."""
    optim: OptimConfig = OptimConfig(lr=1e-2)
    """Optimizer of the trained parameters. Scalers need a larger learning rate than weights: 1e-2 to 3e-2."""
    engine: LoopConfig = LoopConfig(checkpoint_every=100, log_every=25, eval_every=150)
    """Device, precision, checkpoints and logs."""
    pack: PackConfig = PackConfig()
    """How targets are packed; it changes speed and memory, not results."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job of a pack, if it is submitted."""
    baselines: tuple[PathKey, ...] = ()
    """Run directories whose held-out losses family.png shows for comparison, such as models trained from scratch."""
    limit: int = Field(200, ge=1, le=1_000_000)
    """Maximum number of targets that runs without `yes`; it guards against grids that are larger than intended."""
    yes: bool = False
    """Run a grid of more than `limit` targets."""
    only: tuple[str, ...] = ()
    """Names of the targets to run. Default: all targets of the grid."""
