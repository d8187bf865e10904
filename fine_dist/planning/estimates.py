"""Estimates of a stage's memory, disk space and time, for `--dry-run` and `fine-dist plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fine_dist.core.config import Config, dump_yaml
from fine_dist.core.errors import ConfigError
from fine_dist.engine.world import read_environment
from fine_dist.model.flops import train_flops
from fine_dist.model.roles import count_by_role
from fine_dist.planning.devices import DeviceModel, device_for
from fine_dist.planning.memory import Memory, Projector, estimate, groups_of
from fine_dist.stages.blueprint import Blueprint, Stage
from fine_dist.stages.condense import CondenseStage
from fine_dist.stages.repa import encoder_facts
from fine_dist.stages.settings import CondenseConfig, StageConfig, TrainConfig
from fine_dist.stages.train import TrainStage


def stage_of(config: Config) -> Stage[Any] | None:
    """The stage that trains one model with these settings; None for a config of another command."""
    if isinstance(config, CondenseConfig):
        return CondenseStage(config)
    return TrainStage(config) if isinstance(config, TrainConfig) else None


@dataclass(frozen=True)
class StageEstimate:
    """Estimates of a stage from its settings and the model that it would train."""

    config: StageConfig
    plan: Blueprint

    def micro_batch(self, world_size: int) -> int:
        """Samples that a process computes at once."""
        return self.config.engine.micro_batch or max(1, self.config.batch // world_size)

    def projector(self) -> Projector | None:
        """REPA's projector and image encoder, if the loss has that term."""
        if not self.config.loss.repa:
            return None
        return Projector(self.config.loss.repa_width, *encoder_facts(self.config))

    def memory(self, world_size: int, accelerator: bool = False) -> Memory:
        """The memory of one process, including its teacher and REPA's encoder and projector.

        Args:
            world_size: Number of processes.
            accelerator: Whether the process runs on a GPU.
        """
        micro, plan = self.micro_batch(world_size), self.plan
        cost = plan.method.cost(plan.model, micro)
        return estimate(
            plan.arch,
            self.config.engine,
            micro_batch=micro,
            world_size=world_size,
            num_params=cost.stored,
            num_trained=cost.trained,
            kept=cost.saved_for_backward,
            teacher=plan.teacher.count() if plan.teacher else 0,
            projector=self.projector(),
            groups=groups_of(plan.model),
            accelerator=accelerator,
        )

    def disk_bytes(self) -> int:
        """Disk space in bytes of checkpoints and results. A checkpoint has the trained parameters, two moments and the
        EMA in fp32; while one is written, there is one more than `keep_checkpoints`."""
        cost, projector = self.plan.method.cost(self.plan.model), self.projector()
        trained = cost.trained + (projector.numbers(self.plan.arch) if projector else 0)
        return 4 * trained * 4 * (self.config.engine.keep_checkpoints + 1) + 8 * cost.stored

    def step_flops(self) -> float:
        """FLOPs of one update, summed over all processes."""
        return train_flops(self.plan.arch) * self.config.batch

    def device(self, spec: str | None = None) -> DeviceModel:
        """The device of each process: the one that `--for` names, or the one that the job will most likely use."""
        return device_for(spec, self.config.launch, self.config.engine)

    def hours(self, device: DeviceModel, world_size: int) -> float:
        """Duration of the stage in hours on `world_size` devices."""
        return self.step_flops() * self.config.steps / (device.flops_per_s * world_size) / 3600


def estimate_of(config: Config) -> StageEstimate | None:
    """The estimate of a config's stage; None when it trains no single model, or the model's shape is not known yet."""
    stage = stage_of(config)
    plan = stage.blueprint() if stage else None
    return StageEstimate(stage.config, plan) if stage and plan else None


def dry_run(config: StageConfig, plan: Blueprint | None, device: str | None = None) -> list[str]:
    """The resolved config, counts and estimates, as lines to print.

    Args:
        config: Settings of the stage.
        plan: The model that it would train, on the meta device.
        device: Value of `--for`. None: the device that the job will most likely use.

    Raises:
        ConfigError: The shape of the model or the device is unknown.
    """
    if plan is None:
        raise ConfigError("arch: the model's shape is not known yet; give --arch, or create the parent first")
    needs = StageEstimate(config, plan)
    world_size = max(read_environment().world_size, config.launch.nodes * config.launch.processes)
    micro, flops, assumed = needs.micro_batch(world_size), needs.step_flops(), needs.device(device)
    cost = plan.method.cost(plan.model, micro)
    parts = ", ".join(f"{name} {count:,}" for name, count in count_by_role(plan.model).items())
    paths: Any = getattr(plan.model, "paths", None)
    choices = ", ".join(map(" ".join, paths(micro).items())) if paths else ""
    return [
        dump_yaml(config).rstrip(),
        "",
        f"model: {plan.arch.name}, {cost.stored:,} parameters ({parts}), {cost.trained:,} of them trained",
        *([f"compute paths at {micro} samples: {choices}"] if paths else []),
        f"work: {config.steps:,} steps of {config.batch} samples, {flops / 1e12:.3g} TFLOP a step, "
        f"{flops * config.steps / 1e15:,.3f} PFLOP in total",
        f"time: {needs.hours(assumed, world_size):.2g} h, if each of {world_size} processes does {assumed.rate}",
        f"memory of a process ({world_size} of them, micro-batch {micro}, {config.engine.backend}, "
        f"{config.engine.precision}):",
        *needs.memory(world_size, assumed.accelerator).lines(),
        "dry run: nothing was done",
    ]
