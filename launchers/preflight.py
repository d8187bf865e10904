"""The preflight: checks whether a job can work before it is submitted.

It checks accelerators, memory, hours, the number of shards and ranks, disk and storage, and calls the stage's own
`check`. `fine-dist plan` prints the findings; a dry run and every submission refuse a job that cannot work. All three
call `check_job`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fine_dist.artifacts.locate import exists_locally, is_hub_name
from fine_dist.core.config import Config, expand_path
from fine_dist.core.errors import DataError, FineDistError, LaunchError
from fine_dist.core.limits import FAR_BEYOND, GIB, num_cores
from fine_dist.core.regular_files import last_row
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig
from fine_dist.launchers.code_snapshot import code_files
from fine_dist.launchers.launch_target import LaunchTarget
from fine_dist.launchers.launcher import Launcher
from fine_dist.launchers.machine import local_capacity
from fine_dist.launchers.spec import Capacity, Finding, JobSpec
from fine_dist.launchers.worker import import_module

if TYPE_CHECKING:
    from fine_dist.planning.devices import DeviceModel
    from fine_dist.planning.estimates import StageEstimate

log = logging.getLogger(__name__)

NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "wekafs", "fuse.juicefs", "glusterfs", "virtiofs"}
"""Types of file systems that several machines share."""
MEMORY_MARGIN = 0.98
"""Share of an accelerator's stated memory that programs may use; the driver reserves the rest. Estimates include the
allocator's margin, NCCL's buffers and the CUDA context."""
MISSING = "missing"
"""Subject of findings about files that this machine lacks, but the machine of the job may have."""
LOCAL_SUBJECTS = (MISSING, "disk", "memory", "gpus")
"""Subjects of findings about this machine only: a dry run prints them as notes, a start refuses the job."""
UPLOAD_LIMIT = 100 * 2**20
"""Maximum size in bytes of a working directory that Ray uploads."""


def check_job(
    module: str, config: Config, spec: JobSpec, target: LaunchTarget | None, *, many: bool = False, light: bool = False,
    rate: float | None = None, capacity: Capacity | None = None, device: DeviceModel | None = None,
) -> list[Finding]:  # fmt: skip
    """All findings about a job before it starts.

    Args:
        module: Importable name of a module with `run(config)`. Its `check(config)`, if it has one, raises the
            errors that `run` would raise before its first step.
        config: The config of the job, or of one task of a fan-out.
        spec: The job.
        target: Where it will run. None: unknown.
        many: Whether the job is a task of a fan-out.
        light: Whether to omit estimates that build the model.
        rate: Updates per second, if stated. None: the rate that an earlier run in the directory has logged.
        capacity: Capacity of the machines. None: the target's.
        device: The device of each process, if it is stated (`--for`): the job is then checked for that
            device, whatever this machine has.
    """
    if capacity is None and isinstance(target, Launcher):
        capacity = target.capacity(spec, many)
    # A stated device (`--for gpu:h100`) stands for machines elsewhere, so this machine's accelerators do not count.
    if device is not None:
        accelerators = spec.accelerators_per_node or float(spec.processes_per_node)
        spec = spec.model_copy(update={"accelerators_per_node": accelerators if device.accelerator else 0.0})
        host, workers = (capacity.host_bytes, capacity.workers) if capacity else (None, 1)
        capacity = Capacity(workers, device.memory_bytes, not device.accelerator, host)
    findings = [*_stage(module, config)]
    findings += preflight(config, spec, light=light, capacity=capacity, rate=rate, device=device)
    return findings + (target.findings(spec, many) if target is not None and device is None else [])


def preflight(
    config: Config, spec: JobSpec, *, light: bool = False, capacity: Capacity | None = None, rate: float | None = None,
    device: DeviceModel | None = None,
) -> list[Finding]:  # fmt: skip
    """Findings from a job's config and from the capacity of its machines (None: unknown)."""
    findings = _data(config, spec)
    needs = None if light else _estimate(config)
    if needs is not None:
        findings.append(_memory(needs, spec, capacity))
    findings.append(_disk(Path(spec.run_dir), needs.disk_bytes() if needs else 0))
    return [*findings, *(_time(config, spec, rate) or _estimated_time(needs, spec, device)), *_storage(spec)]


def refuse(needs: LaunchConfig, findings: list[Finding]) -> None:
    """Refuse a job that cannot work, with all reasons; with `launch.preflight warn` they are only logged.

    Raises:
        LaunchError: A finding has the level `stop`.
    """
    reasons = [f"{finding.what}: {finding.text}" for finding in findings if finding.level == "stop"]
    if not reasons or needs.preflight == "off":
        return
    text = "the preflight found that this cannot work:\n  " + "\n  ".join(reasons)
    if needs.preflight == "refuse":
        raise LaunchError(f"{text}\n(--launch.preflight warn submits it anyway)")
    log.warning("%s", text)


# --- the stage itself ------------------------------------------------------------------------------------------------


def _stage(module: str, config: Config) -> list[Finding]:
    """The finding of the stage's own `check`."""
    check: Callable[[Config], None] | None = getattr(import_module(module), "check", None)
    if check is None:
        return []
    try:
        check(config)
    except FineDistError as error:
        return [Finding("settings", "stop", str(error))]
    return [Finding("settings", "ok", "shapes, data and parents fit each other")]


# --- data ----------------------------------------------------------------------------------------------------------


def _data(config: Config, spec: JobSpec) -> list[Finding]:
    data, batch = getattr(config, "data", None), getattr(config, "batch", None)
    if not isinstance(data, DataConfig):
        return []
    findings = []
    if batch and batch % spec.world_size and "steps" in type(config).model_fields:
        multiple = max(spec.world_size, round(batch / spec.world_size) * spec.world_size)
        text = (
            f"a batch of {batch} cannot be divided over {spec.world_size} processes; use a multiple, such as {multiple}"
        )
        findings.append(Finding("data", "stop", text))
    findings += _missing_models(config)
    if not data.shards and "steps" in type(config).model_fields and not getattr(config, "domains", None):
        findings.append(Finding(MISSING, "stop", "data.shards is not set: give a folder that `fine-dist encode` wrote"))
    if not data.shards or "://" in data.shards or data.shards.startswith("pipe:"):
        return findings
    from fine_dist.data.sources import locate  # needs torch

    shards = expand_path(data.shards)
    try:
        manifest, _ = locate(shards, data)
    except DataError as error:
        return [*findings, Finding("data" if os.path.exists(shards) else MISSING, "stop", str(error))]
    count = sum(shard.count > 0 for shard in manifest.shards)
    text = f"{manifest.count:,} samples in {count} shards"
    if count < spec.world_size:
        text += f" for {spec.world_size} processes: some will share a shard; encode into {spec.world_size} or more"
        return [*findings, Finding("data", "note", text)]
    return [*findings, Finding("data", "ok", text)]


def _missing_models(config: Config) -> list[Finding]:
    """Findings about models in the config that are not on this machine."""
    paths = {key: getattr(config, key, None) for key in ("ancestor", "parent", "parents")}
    if "parents" in type(config).model_fields and not any(
        (paths["parent"], paths["parents"], getattr(config, "arch", None))
    ):
        text = "arch: give an architecture (such as DiT-B/2-L6), or a parent to take it from"
        return [Finding(MISSING, "stop", text)]
    return [
        Finding(MISSING, "stop", f"{key} {path} does not exist; run the command that creates it first")
        for key, path in paths.items()
        if isinstance(path, str) and not exists_locally(path) and not os.path.isdir(path) and not is_hub_name(path)
    ]


# --- memory and disk -----------------------------------------------------------------------------------------------


def _estimate(config: Config) -> StageEstimate | None:
    """The estimate of a stage; None if its shape is not known yet, or nothing trains."""
    # Imported here, because it needs torch.
    from fine_dist.planning.estimates import estimate_of

    return estimate_of(config)


def _memory(needs: StageEstimate, spec: JobSpec, capacity: Capacity | None) -> Finding:
    memory = needs.memory(spec.world_size, accelerator=bool(spec.accelerators_per_node))
    need, micro = memory.total, needs.micro_batch(spec.world_size)
    parts = f" ({memory.parts})" if memory.total > memory.tensors else ""
    text = f"{needs.plan.arch.name} needs {need / GIB:.1f} GiB a process at {micro} samples{parts}"
    owner, available = _available(needs.config.launch, spec, capacity)
    if available is None:
        key = "gpu_memory_gb" if spec.accelerators_per_node else "memory_gb"
        return Finding("memory", "note", f"{text}; set launch.{key} to compare it")
    if need > available:
        remedy = "lower engine.micro_batch, set engine.activation_checkpointing blocks, or shard more (deepspeed.stage)"
        return Finding("memory", "stop", f"{text} and {owner} has {available / GIB:.1f}; {remedy}")
    return Finding("memory", "ok", f"{text}; {owner} has {available / GIB:.1f}")


def beyond_this_machine(config: Config, spec: JobSpec) -> str:
    """A sentence about what a job needs far beyond this machine's cores and memory; empty if it needs nothing such.

    Such a job would be killed without a message, or would run for ever. The preflight makes the exact comparison.
    """
    threads = getattr(getattr(config, "engine", None), "threads", None) or 0
    if threads > max(64, 16 * num_cores()):
        return (
            f"engine.threads {threads}: this machine has {num_cores()} cores, and more threads only wait for each "
            f"other; give at most {max(64, 16 * num_cores())}, or null to leave the choice to torch"
        )
    needs = _estimate(config)
    if needs is None:
        return ""
    capacity = local_capacity(spec, many=False, gpu_memory_gb=needs.config.launch.gpu_memory_gb)
    available = _available(needs.config.launch, spec, capacity)[1]
    if available is None or needs.memory(spec.world_size).total <= FAR_BEYOND * available:
        return ""
    return f"{_memory(needs, spec, capacity).text}, or lower batch"


def _available(needs: LaunchConfig, spec: JobSpec, capacity: Capacity | None) -> tuple[str, float | None]:
    """Whose memory a process uses, and how many bytes of it are available; None if that is unknown."""
    if spec.accelerators_per_node:
        each = needs.gpu_memory_gb * GIB if needs.gpu_memory_gb else capacity.accelerator_bytes if capacity else None
        return "an accelerator", each and each * MEMORY_MARGIN
    if spec.memory_gb:
        return "its share of launch.memory_gb", spec.memory_gb * GIB / spec.processes_per_node
    if capacity and capacity.host_bytes:
        return "its share of the machine", capacity.host_bytes / spec.processes_per_node
    return "", None


def _disk(run_dir: Path, need: int) -> Finding:
    # The run directory may not exist yet; its nearest existing parent is on the same disk.
    folder = run_dir
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("disk", "stop", f"{folder} cannot be written to; choose another run_dir")
    free = shutil.disk_usage(folder).free
    text = f"{need / GIB:.1f} GiB for checkpoints and results, {free / GIB:.0f} GiB free at {folder}"
    if need > free:
        return Finding("disk", "stop", f"{text}; free some, lower engine.keep_checkpoints, or choose another run_dir")
    return Finding("disk", "ok", text)


# --- time and storage -----------------------------------------------------------------------------------------------


def _time(config: Config, spec: JobSpec, rate: float | None) -> list[Finding]:
    steps = getattr(config, "steps", None)
    measured = rate or _measured(Path(spec.run_dir))
    if not steps or not measured:
        return []
    hours = steps / measured / 3600
    text = f"{steps:,} steps at {measured:.3g} a second: {hours:.3g} h"
    if not spec.minutes:
        return [Finding("time", "ok", text)]
    starts = hours * 60 / spec.minutes
    # The first start and the restarts that SLURM may make.
    allowed = 1 + getattr(config, "launch", LaunchConfig()).max_restarts
    text += f", {starts:.1f} times the limit of {spec.minutes} min"
    if starts > allowed:
        return [Finding("time", "stop", f"{text}, and at most {allowed} starts; raise launch.minutes or max_restarts")]
    return [Finding("time", "ok", text)]


def _estimated_time(needs: StageEstimate | None, spec: JobSpec, device: DeviceModel | None) -> list[Finding]:
    """Hours from the count of FLOPs, if no rate was measured; such an estimate is only a note."""
    if needs is None:
        return []
    assumed = device or needs.device()
    hours, steps = needs.hours(assumed, spec.world_size), needs.config.steps
    text = f"{steps:,} steps: {hours:.2g} h, if each of {spec.world_size} processes does {assumed.rate}"
    return [Finding("time", "note", f"{text}; --rate takes a measured number of steps per second")]


def _measured(run_dir: Path) -> float | None:
    """Updates per second that a run in this directory logged last; None if there is no such number."""
    row = last_row(run_dir / "metrics.jsonl", "steps_per_s")
    rate = row["steps_per_s"] if row else None
    return float(rate) if isinstance(rate, (int, float)) and rate > 0 else None


def _storage(spec: JobSpec) -> list[Finding]:
    """Whether the run directory is on a shared file system, as far as this machine shows; every job checks again."""
    kind = file_system(Path(spec.run_dir))
    if kind in NETWORK:
        return [Finding("storage", "ok", f"{spec.run_dir} is on {kind}")]
    return [Finding("storage", "note", f"{spec.run_dir} is on {kind}: every node must see it under this path")]


def file_system(path: Path) -> str:
    """Type of the file system that holds a path, such as `ext4` (Linux)."""
    best, kind = "", "an unknown file system"
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    except OSError:
        return kind
    real_path = os.path.realpath(path)
    for line in mounts.splitlines():
        _, point, name, *_ = line.split()
        # Mounts may be nested: the longest mount point that contains the path applies.
        if (real_path == point or real_path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, name
    return kind


# --- the code ---------------------------------------------------------------------------------------------------------


def check_upload(module: str, limit: int = UPLOAD_LIMIT) -> Finding:
    """The size of the code that a submission copies, compared with the limit of Ray's uploads."""
    return check_code_size({name: path.stat().st_size for name, path in code_files(module).items()}, limit)


def check_code_size(sizes: dict[str, int], limit: int = UPLOAD_LIMIT) -> Finding:
    """The sum of file sizes (bytes by name) compared with a limit; above it, the five largest files are listed."""
    total = sum(sizes.values())
    text = f"{len(sizes)} files of code, {total / 2**20:.1f} MiB (Ray uploads at most {limit / 2**20:.0f})"
    if total <= limit:
        return Finding("code", "ok", text)
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
    lines = "".join(f"\n{sizes[name] / 2**20:18.1f} MiB  {name}" for name in largest)
    return Finding("code", "stop", f"{text}; move the largest out of the package:{lines}")
