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
    """A data set that targets are initialised on."""

    data: DataConfig = DataConfig()
    """Its latents."""
    labels: Literal["same", "keep", "new"] = "same"
    """`same`: its classes are the parent's, which is checked by class names or their number. `keep`: use the labels as
    they are, unchecked. `new`: each target trains a label embedder of its own."""


class InitConfig(Config):
    """Stage 2: initialise a family of targets, depths x data sets x seeds x learning rates x variants, from one parent.

    Targets that share frozen genes are packed: they train as one program, whatever their depth, data, seed and rate.
    """

    run_dir: PathKey = "runs/init"
    """Where everything is written: a folder a target."""
    parent: PathKey | None = None
    """A learngene, a model, a run's directory; another project's model (DiT's `.pt`, a folder of diffusers, a name on
    the hub); none for a method that needs none."""
    hints: HintsConfig = HintsConfig()
    """What another project's file does not say of itself."""
    method: AnyMethod | None = None
    """How targets are made; none: the parent's own method, as it was condensed."""
    arch: Arch | None = None
    """Shape of the targets but for their depth; none: the parent's."""
    depths: tuple[Depth, ...] = (4, 6, 8, 10, 12)
    """Layers of the targets."""
    data: DataConfig = DataConfig()
    """The data set, when there is one."""
    labels: Literal["same", "keep", "new"] = "same"
    """What labels of `data` mean: as `domains.NAME.labels`."""
    domains: dict[str, DomainConfig] = Field(default_factory=dict)
    """Data sets by name, when there are several; `data` is not read then."""
    seeds: tuple[Seed, ...] = (0,)
    """Each orders the data and draws noise, and whatever of a beginning is random."""
    lrs: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Learning rates of what trains; none: `optim.lr`."""
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Settings of the method to vary, such as where its scalers begin; none: the method as it is."""
    steps: int = Field(300, ge=1, le=1_000_000_000)
    """Updates of what trains."""
    batch: int = Field(64, ge=1, le=2**20)
    """Samples an update of one target, over all processes."""
    stop: EarlyStop | None = None
    """End a target early; none: never."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""
    optim: OptimConfig = OptimConfig(lr=1e-2)
    """Optimiser of what trains."""
    engine: LoopConfig = LoopConfig(checkpoint_every=100, log_every=25, eval_every=150)
    """How targets train."""
    pack: PackConfig = PackConfig()
    """How targets are packed."""
    launch: LaunchConfig = LaunchConfig()
    """What a pack needs, where it is submitted."""
    baselines: tuple[PathKey, ...] = ()
    """Runs whose held-out losses are drawn beside the targets', such as models trained from scratch."""
    limit: int = Field(200, ge=1, le=1_000_000)
    """Targets beyond which a grid is refused without `yes`: a family is easily larger than was meant."""
    yes: bool = False
    """Run a grid larger than `limit`."""
    only: tuple[str, ...] = ()
    """Names of the targets to run; none: all."""
