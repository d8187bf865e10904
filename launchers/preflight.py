"""Whether a job can work, before it is submitted: accelerators, memory, hours, shards against ranks, disk, storage.

`fine_dist.plan` prints what is found; every submission refuses what cannot work, with the remedy. What a scheduler
would say is its launcher's to find.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.config import Config, expand_path
from fine_dist.core.errors import DataError, LaunchError
from fine_dist.core.files import last_row
from fine_dist.core.limits import GIB
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig
from launchers.code_snapshot import code_files
from launchers.spec import Capacity, Finding, JobSpec

if TYPE_CHECKING:
    from fine_dist.stages.config import Blueprint

log = logging.getLogger(__name__)

NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "wekafs", "fuse.juicefs", "glusterfs", "virtiofs"}
"""File systems that several machines see."""
MEMORY_MARGIN = 0.92
"""Share of an accelerator's memory that a process may plan for: the rest is the context's and the allocator's."""
UPLOAD_LIMIT = 100 * 2**20
"""Bytes of a working directory that Ray uploads at most."""


def preflight(
    module: str, config: Config, spec: JobSpec, *, light: bool = False, capacity: Capacity | None = None,
    rate: float | None = None,
) -> list[Finding]:  # fmt: skip
    """What can be known of a job from its config and the machines it will run on.

    light: leave out what needs torch. capacity: those machines; None: nothing is known of them.
    rate:  updates a second, stated; None: measured by an earlier run in its directory.
    """
    found = _data(config, spec)
    plan = None if light else _plan(config)
    if plan is not None:
        found += [_memory(config, spec, plan, capacity), _disk_for(config, spec, plan)]
    else:
        found.append(_disk(Path(spec.run_dir), 0))
    found += [*_time(config, spec, rate), *_storage(spec)]
    return found


def refuse(needs: LaunchConfig, found: list[Finding]) -> None:
    """`LaunchError` with all reasons why a job cannot work; with `launch.preflight warn` they are only printed."""
    reasons = [f"{finding.what}: {finding.text}" for finding in found if finding.level == "stop"]
    if not reasons or needs.preflight == "off":
        return
    text = "the preflight found that this cannot work:\n  " + "\n  ".join(reasons)
    if needs.preflight == "refuse":
        raise LaunchError(f"{text}\n(--launch.preflight warn submits it all the same)")
    log.warning(text)


# --- data ----------------------------------------------------------------------------------------------------------


def _data(config: Config, spec: JobSpec) -> list[Finding]:
    data, batch = getattr(config, "data", None), getattr(config, "batch", None)
    if not isinstance(data, DataConfig):
        return []
    found = []
    if batch and batch % spec.world_size and "steps" in type(config).model_fields:
        near = max(spec.world_size, round(batch / spec.world_size) * spec.world_size)
        text = f"a batch of {batch} cannot be divided over {spec.world_size} processes; use a multiple, such as {near}"
        found.append(Finding("data", "stop", text))
    if not data.shards or "://" in data.shards or data.shards.startswith("pipe:"):
        return found
    from fine_dist.data.sources import locate

    try:
        manifest, _ = locate(expand_path(data.shards), data)
    except DataError as error:
        return [*found, Finding("data", "stop", str(error))]
    shards = sum(shard.count > 0 for shard in manifest.shards)
    text = f"{manifest.count:,} samples in {shards} shards"
    if shards < spec.world_size:
        text += (
            f" for {spec.world_size} processes: some will read the same shards; encode into {spec.world_size} or more"
        )
        return [*found, Finding("data", "note", text)]
    return [*found, Finding("data", "ok", text)]


# --- memory and disk -----------------------------------------------------------------------------------------------


def _plan(config: Config) -> Blueprint | None:
    """What a stage would train; none when it is not known yet, or nothing trains."""
    from fine_dist.stages.config import StageConfig

    return config.blueprint() if isinstance(config, StageConfig) else None


def _memory(config: Any, spec: JobSpec, plan: Blueprint, capacity: Capacity | None) -> Finding:
    from fine_dist.planning.estimates import stage_memory

    micro = config.engine.micro_batch or max(1, config.batch // spec.world_size)
    need = stage_memory(config, plan, spec.world_size).total
    text = f"{plan.arch.name} needs {need / GIB:.1f} GiB a process at {micro} samples"
    where, most = _most(config.launch, spec, capacity)
    if most is None:
        key = "gpu_memory_gb" if spec.accelerators_per_node else "memory_gb"
        return Finding("memory", "note", f"{text}; say launch.{key} to have it compared")
    if need > most:
        remedy = "lower engine.micro_batch, set engine.activation_checkpointing blocks, or shard more (deepspeed.stage)"
        return Finding("memory", "stop", f"{text} and {where} has {most / GIB:.1f}; {remedy}")
    return Finding("memory", "ok", f"{text}; {where} has {most / GIB:.1f}")


def _most(needs: LaunchConfig, spec: JobSpec, capacity: Capacity | None) -> tuple[str, float | None]:
    """Bytes that one process may use, and whose; None when it is not known here."""
    if spec.accelerators_per_node:
        each = needs.gpu_memory_gb * GIB if needs.gpu_memory_gb else capacity.accelerator_bytes if capacity else None
        return "an accelerator", each and each * MEMORY_MARGIN
    if spec.memory_gb:
        return "its share of launch.memory_gb", spec.memory_gb * GIB / spec.processes_per_node
    if capacity and capacity.host_bytes:
        return "its share of the machine", capacity.host_bytes / spec.processes_per_node
    return "", None


def accelerators(spec: JobSpec, devices: int) -> list[Finding]:
    """Whether this machine, which shows `devices` accelerators, has those that a job asks for; a job that asks for one
    is never run on the CPU unsaid."""
    wanted = spec.accelerators_per_node
    if not wanted:
        return []
    if devices >= wanted:
        return [Finding("gpus", "ok", f"{wanted:g} accelerators wanted, {devices} here")]
    each = wanted / spec.processes_per_node
    has = f"has {devices}" if devices else "shows no accelerator"
    text = f"launch.gpus {each:g} for {spec.processes_per_node} processes, and this machine {has}"
    remedy = "--launch.gpus 0 computes on the CPU; --launcher slurm or ray sends it to machines that have them"
    fewer = "lower launch.gpus or launch.processes; " if devices else "check nvidia-smi and CUDA_VISIBLE_DEVICES; "
    return [Finding("gpus", "stop", f"{text}; {fewer}{remedy}")]


def _disk_for(config: Any, spec: JobSpec, plan: Blueprint) -> Finding:
    """A checkpoint holds what trains, two moments and the EMA in fp32; one more than are kept exists while writing."""
    cost = plan.method.cost(plan.model)
    checkpoint = 4 * cost.trained * 4
    return _disk(Path(spec.run_dir), checkpoint * (config.engine.keep_checkpoints + 1) + 8 * cost.stored)


def _disk(run_dir: Path, need: int) -> Finding:
    place = run_dir
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding("disk", "stop", f"{place} cannot be written to; choose another run_dir")
    free = shutil.disk_usage(place).free
    text = f"{need / GIB:.1f} GiB for checkpoints and results, {free / GIB:.0f} GiB free at {place}"
    if need > free:
        return Finding("disk", "stop", f"{text}; free some, lower engine.keep_checkpoints, or choose another run_dir")
    return Finding("disk", "ok", text)


# --- time and place ------------------------------------------------------------------------------------------------


def _time(config: Any, spec: JobSpec, rate: float | None) -> list[Finding]:
    steps = getattr(config, "steps", None)
    measured = rate or _measured(Path(spec.run_dir))
    if not steps or not measured:
        return []
    hours = steps / measured / 3600
    text = f"{steps:,} steps at {measured:.3g} a second: {hours:.3g} h"
    if not spec.minutes:
        return [Finding("time", "ok", text)]
    lives = hours * 60 / spec.minutes
    allowed = 1 + getattr(config, "launch", LaunchConfig()).max_restarts
    text += f", {lives:.1f} times the limit of {spec.minutes} min"
    if lives > allowed:
        return [Finding("time", "stop", f"{text}, and at most {allowed} starts; raise launch.minutes or max_restarts")]
    return [Finding("time", "ok", text)]


def _measured(run_dir: Path) -> float | None:
    """Updates a second that a run in this directory has logged last."""
    row = last_row(run_dir / "metrics.jsonl", "steps_per_s")
    return float(row["steps_per_s"]) or None if row and row["steps_per_s"] else None


def _storage(spec: JobSpec) -> list[Finding]:
    """Whether the run directory looks shared; only a job on the nodes can prove it, and every job checks."""
    kind = file_system(Path(spec.run_dir))
    if kind in NETWORK:
        return [Finding("storage", "ok", f"{spec.run_dir} is on {kind}")]
    return [Finding("storage", "note", f"{spec.run_dir} is on {kind}: every node must see it under this path")]


def file_system(path: Path) -> str:
    """Type of the file system that holds a path (Linux)."""
    best, kind = "", "an unknown file system"
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    except OSError:
        return kind
    where = os.path.realpath(path)
    for line in mounts.splitlines():
        _, point, name, *_ = line.split()
        if (where == point or where.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, name
    return kind


# --- the code ---------------------------------------------------------------------------------------------------------


def upload(module: str, limit: int = UPLOAD_LIMIT) -> Finding:
    """The size of the code that a submission copies, against what Ray uploads; the largest entries when over it."""
    return weigh({name: path.stat().st_size for name, path in code_files(module).items()}, limit)


def weigh(sizes: dict[str, int], limit: int = UPLOAD_LIMIT) -> Finding:
    """Sizes by name, in bytes, against a limit on their sum."""
    total = sum(sizes.values())
    text = f"{len(sizes)} files of code, {total / 2**20:.1f} MiB (Ray uploads at most {limit / 2**20:.0f})"
    if total <= limit:
        return Finding("code", "ok", text)
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    lines = "".join(f"\n{sizes[name] / 2**20:18.1f} MiB  {name}" for name in largest)
    return Finding("code", "stop", f"{text}; move the largest out of the package:{lines}")
