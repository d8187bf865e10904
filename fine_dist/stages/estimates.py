"""What a stage will need, said before anything is started: `--dry-run`, and the memory figures of `fine_dist.plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fine_dist.config import dump_yaml

if TYPE_CHECKING:
    from fine_dist.model.dit import DiT
    from fine_dist.model.zoo import Arch
    from fine_dist.stages import StageConfig
    from fine_dist.stages.memory import Memory

ASSUMED_TFLOPS = 120.0
"""What `--dry-run` supposes of an accelerator: 40% of an A100's bf16 peak. `fine_dist.plan` takes a measured rate."""


def dry_run(config: StageConfig, arch: Arch, model: DiT, rank: int | None) -> list[str]:
    """The resolved config, counts and estimates, as lines to print."""
    from fine_dist.engine.dist import read_environment
    from fine_dist.model.factors import FactoredDiT, role
    from fine_dist.model.flops import train_flops

    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[role(name)] = counts.get(role(name), 0) + parameter.numel()
    total = sum(counts.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    launch = config.launch
    world_size = max(read_environment().world_size, launch.nodes * launch.processes)
    micro = config.engine.micro_batch or max(1, config.batch // world_size)
    memory = stage_memory(config, arch, total, trained, rank, world_size, micro)
    flops = train_flops(arch) * config.batch
    hours = flops * config.steps / (ASSUMED_TFLOPS * 1e12 * world_size) / 3600
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    lines = [
        dump_yaml(config).rstrip(),
        "",
        f"model: {arch.name}, {total:,} numbers ({parts}), {trained:,} of them train",
    ]
    if isinstance(model, FactoredDiT):
        lines.append(
            f"compute paths at {micro} samples: " + ", ".join(f"{k} {p}" for k, p in model.paths(micro).items())
        )
    lines += [
        f"work: {config.steps:,} steps of {config.batch} samples, {flops / 1e12:.3g} TFLOP a step, "
        f"{flops * config.steps / 1e15:,.3f} PFLOP in all",
        f"time: {hours:.2g} h, if each of {world_size} processes does {ASSUMED_TFLOPS:g} TFLOP/s",
        f"memory of a process ({world_size} of them, micro-batch {micro}, {config.engine.backend}, "
        f"{config.engine.precision}):",
        *memory.lines(),
        "dry run: nothing was done",
    ]
    return lines


def stage_memory(
    config: StageConfig, arch: Arch, total: int, trained: int, rank: int | None, world_size: int, micro: int
) -> Memory:
    """The memory of one process of a stage."""
    from fine_dist.stages.memory import estimate

    return estimate(
        arch,
        config.engine,
        micro_batch=micro,
        world_size=world_size,
        num_params=total,
        num_trained=trained,
        rank=rank,
    )
