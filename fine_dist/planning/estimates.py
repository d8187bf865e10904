"""What a stage needs, estimated before it starts: the lines of `--dry-run`, and the memory of `fine-dist plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fine_dist.core.config import dump_yaml
from fine_dist.core.errors import ConfigError
from fine_dist.planning.devices import device_for

if TYPE_CHECKING:
    from fine_dist.planning.memory import Memory
    from fine_dist.stages.config import Blueprint, StageConfig


def dry_run(config: StageConfig, plan: Blueprint | None, device: str | None = None) -> list[str]:
    """The resolved config, counts and estimates, as lines to print.

    Args:
        config: Settings of the stage.
        plan: Its model, without memory for weights.
        device: Value of `--for`. None: the device that the job will use, as far as is known.

    Raises:
        ConfigError: The model's shape is not known, or the device is not.
    """
    from fine_dist.engine.dist import read_environment
    from fine_dist.model.flops import train_flops
    from fine_dist.model.roles import count_by_role

    if plan is None:
        raise ConfigError("arch: what would be trained is not known yet")
    counts = count_by_role(plan.model)
    launch = config.launch
    world_size = max(read_environment().world_size, launch.nodes * launch.processes)
    micro = config.engine.micro_batch or max(1, config.batch // world_size)
    cost = plan.method.cost(plan.model, micro)
    memory = stage_memory(config, plan, world_size)
    flops = train_flops(plan.arch) * config.batch
    assumed = device_for(device, launch, config.engine)
    hours = flops * config.steps / (assumed.flops_per_s * world_size) / 3600
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    paths: Any = getattr(plan.model, "paths", None)
    chosen = [f"compute paths at {micro} samples: {', '.join(map(' '.join, paths(micro).items()))}"] if paths else []
    return [
        dump_yaml(config).rstrip(),
        "",
        f"model: {plan.arch.name}, {cost.stored:,} numbers ({parts}), {cost.trained:,} of them train",
        *chosen,
        f"work: {config.steps:,} steps of {config.batch} samples, {flops / 1e12:.3g} TFLOP a step, "
        f"{flops * config.steps / 1e15:,.3f} PFLOP in all",
        f"time: {hours:.2g} h, if each of {world_size} processes does {assumed.rate}",
        f"memory of a process ({world_size} of them, micro-batch {micro}, {config.engine.backend}, "
        f"{config.engine.precision}):",
        *memory.lines(),
        "dry run: nothing was done",
    ]


def stage_memory(config: StageConfig, plan: Blueprint, world_size: int) -> Memory:
    """The memory of one process of a stage, with that of its teacher."""
    from fine_dist.planning.memory import estimate

    micro = config.engine.micro_batch or max(1, config.batch // world_size)
    cost = plan.method.cost(plan.model, micro)
    return estimate(
        plan.arch,
        config.engine,
        micro_batch=micro,
        world_size=world_size,
        num_params=cost.stored,
        num_trained=cost.trained,
        kept=cost.kept,
        teacher=plan.teacher.count() if plan.teacher else 0,
    )
