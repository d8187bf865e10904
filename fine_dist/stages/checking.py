"""What a stage refuses before its first step, found without starting it: for `plan`, dry runs and submissions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fine_dist.core.config import expand_path, run_dir_of
from fine_dist.core.errors import ConfigError
from fine_dist.data.sources import locate
from fine_dist.data.stream import check_fit
from fine_dist.diffusion.solvers import build_scheduler, resolve_scheduler
from fine_dist.engine.deepspeed_json import deepspeed_json
from fine_dist.engine.program import divide_batch
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.trackers import check_installed
from fine_dist.model.arch import Arch
from fine_dist.stages.blueprint import Stage
from fine_dist.stages.build import check_held_out
from fine_dist.stages.settings import StageConfig


def check_settings(config: StageConfig, world_size: int, arch: Arch | None = None) -> None:
    """Raise what is wrong with a stage's settings whatever its data: the batch, the sampler, DeepSpeed's options.

    Args:
        config: Settings of the stage.
        world_size: Number of processes.
        arch: Shape of what is trained. None while it is not known.

    Raises:
        ConfigError: The first thing that is wrong.
    """
    check_installed(config.engine.tracker)
    micro, accumulation = divide_batch(config.batch, config.engine.micro_batch, world_size)
    if config.engine.backend == "deepspeed":
        deepspeed_json(config.optim, config.engine, world_size, micro, accumulation)
    sampler = resolve_scheduler(config.sampler, config.diffusion)
    if config.diffusion.process == "ddpm":
        build_scheduler(sampler, config.diffusion, arch.learn_sigma if arch else False)


def check_stage(stage: Stage[Any], arch: Arch | None) -> None:
    """Raise what the run of a stage would refuse before its first step. Nothing is written and no lock is taken.

    What is not on this machine (shards, the run directory) is left out: it may be where the job will run.

    Args:
        stage: The stage with its settings.
        arch: Shape of what is trained. None while it is not known.

    Raises:
        FineDistError: The first thing that the run would refuse.
    """
    config = stage.config
    check_settings(config, config.launch.nodes * config.launch.processes, arch)
    if arch is None or config.data.shards is None:
        return
    shards = expand_path(config.data.shards)
    if Path(shards).exists():
        check_fit(locate(shards, config.data)[0], arch, shards)
        if config.data.held_out and Path(expand_path(config.data.held_out)).exists():
            check_held_out(config.data, arch)
        _check_run_dir(stage)


def _check_run_dir(stage: Stage[Any]) -> None:
    """Refuse to continue the run of another config, or one that has done more steps than are asked for."""
    folder = run_dir_of(stage.config)
    if not folder.exists():
        return
    RunDir(folder).check(stage.kind, stage.identity())
    names = [re.fullmatch(r"step_(\d{8,})", path.name) for path in (folder / "checkpoints").glob("step_*")]
    newest = max((int(name[1]) for name in names if name), default=0)
    done = RunDir(folder).done
    steps = stage.config.steps
    if newest > steps and done is None:
        raise ConfigError(
            f"the checkpoint {folder}/checkpoints/step_{newest:08d} is at step {newest}, beyond the {steps} asked for"
        )
