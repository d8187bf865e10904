"""`python -m fine_dist.plan --config FILE --launcher slurm`: whether a job can work, before it is submitted.

Looks at memory, steps and hours, shards against ranks, disk, shared storage, and what the scheduler would say. Every
submission does the same and refuses what cannot work, with the remedy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.config import Config, DataConfig, LaunchConfig, expand_path
from fine_dist.errors import ConfigError, DataError, FineDistError, LaunchError, guard
from fine_dist.jobs import Finding, JobSpec

if TYPE_CHECKING:
    from fine_dist.stages.config import Blueprint

GIB = 2**30
STAGES = ("encode", "condense", "init", "train", "evaluate", "sample")
NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "wekafs", "fuse.juicefs", "glusterfs", "virtiofs"}
"""File systems that several machines see."""
MEMORY_MARGIN = 0.92
"""Share of an accelerator's memory that a process may plan for: the rest is the context's and the allocator's."""
UPLOAD_LIMIT = 100 * 2**20
"""Bytes of a working directory that Ray uploads at most."""


def preflight(
    module: str, config: Config, spec: JobSpec, *, light: bool = False, here: bool = False, rate: float | None = None
) -> list[Finding]:
    """What can be known of a job from its config and this machine.

    light: leave out what needs torch. here: it will run on this machine.
    rate:  updates a second, stated; None: measured by an earlier run in its directory.
    """
    found = _data(config, spec)
    size = None if light else _size(config)
    if size is not None:
        found += [_memory(config, spec, size, here), _disk_for(config, spec, size)]
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
    print(f"warning: {text}", file=sys.stderr)


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


def _size(config: Config) -> Blueprint | None:
    """What a stage would train; none when it is not known yet, or nothing trains."""
    from fine_dist.stages.config import StageConfig

    return config.blueprint() if isinstance(config, StageConfig) else None


def _memory(config: Any, spec: JobSpec, plan: Blueprint, here: bool) -> Finding:
    from fine_dist.stages.estimates import stage_memory

    micro = config.engine.micro_batch or max(1, config.batch // spec.world_size)
    need = stage_memory(config, plan, spec.world_size).total
    text = f"{plan.arch.name} needs {need / GIB:.1f} GiB a process at {micro} samples"
    where, room = _room(config.launch, spec, here)
    if room is None:
        key = "gpu_memory_gb" if spec.accelerators_per_node else "memory_gb"
        return Finding("memory", "note", f"{text}; say launch.{key} to have it compared")
    if need > room:
        remedy = "lower engine.micro_batch, set engine.activation_checkpointing blocks, or shard more (deepspeed.stage)"
        return Finding("memory", "stop", f"{text} and {where} has {room / GIB:.1f}; {remedy}")
    return Finding("memory", "ok", f"{text}; {where} has {room / GIB:.1f}")


def _room(needs: LaunchConfig, spec: JobSpec, here: bool) -> tuple[str, float | None]:
    """Bytes that one process may use, and whose; None when it is not known here."""
    if spec.accelerators_per_node:
        each = needs.gpu_memory_gb * GIB if needs.gpu_memory_gb else local_accelerator_bytes() if here else None
        return "an accelerator", each and each * MEMORY_MARGIN
    if spec.memory_gb:
        return "its share of launch.memory_gb", spec.memory_gb * GIB / spec.processes_per_node
    if here:
        return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / spec.processes_per_node
    return "", None


def local_accelerator_bytes() -> float | None:
    """Memory of this machine's smallest accelerator, without touching it."""
    if not shutil.which("nvidia-smi"):
        return None
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    sizes = [float(line) for line in said.splitlines() if line.strip().isdecimal()]
    return min(sizes) * 2**20 if sizes else None


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
    try:
        rows = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for row in reversed(rows):
        try:
            rate = json.loads(row).get("steps_per_s")
        except ValueError:
            continue  # a line that a crash left half-written
        if rate:
            return float(rate)
    return None


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


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 2 when the job cannot work."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    from fine_dist.cli import parse
    from fine_dist.submit import make_spec, tasks_of
    from fine_dist.worker import config_class, import_module
    from launchers.base import choose

    own = ArgumentParser(prog="python -m fine_dist.plan", description=__doc__, add_help=False)
    own.add_argument(
        "--stage", help=f"which command the config is for ({', '.join(STAGES)}; default: tell by the config)"
    )
    own.add_argument("--rate", type=float, help="updates a second, when no earlier run here has measured them")
    own.add_argument("--json", action="store_true", help="print the findings as JSON")
    known, rest = own.parse_known_args(argv)
    if "-h" in rest or "--help" in rest or not rest:
        print(own.format_help() + "\nand the flags of that command: --config FILE --launcher NAME --KEY.KEY VALUE ...")
        return 0
    module = _module(known.stage, rest)
    call = parse(config_class(import_module(module)), rest, "python -m fine_dist.plan")
    tasks = tasks_of(module, call.config)
    config = tasks[0].config if tasks else call.config
    spec = make_spec(module, config, write=False)
    here = choose(call.launcher) in ("local", "here")
    found = [
        *preflight(module, config, spec, here=here, rate=known.rate),
        *_cluster(call, spec, bool(tasks)),
        upload(module),
    ]
    if tasks:
        found.insert(0, Finding("tasks", "ok", f"{len(tasks)} tasks; what follows is for one of them"))
    if known.json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        print("\n".join(f"{finding.level:5} {finding.what:8} {finding.text}" for finding in found))
    return 2 if any(finding.level == "stop" for finding in found) else 0


def _cluster(call: Any, spec: JobSpec, many: bool) -> list[Finding]:
    from launchers.base import choose, get_launcher

    kind = choose(call.launcher)
    if kind not in ("slurm", "ray"):
        return []
    with get_launcher(kind, needs=getattr(call.config, "launch", None)) as runner:
        return runner.findings(spec, many)


def upload(module: str, limit: int = UPLOAD_LIMIT) -> Finding:
    """The size of the code that a submission copies, against what Ray uploads; the largest entries when over it."""
    from fine_dist.submit import code_files

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


def _module(stage: str | None, argv: list[str]) -> str:
    """The command's module: as said, by the config's place (configs/condense/x.yaml), or the one that accepts it."""
    if stage:
        return stage if "." in stage else f"fine_dist.{stage}"
    path = Path(argv[argv.index("--config") + 1]) if "--config" in argv[:-1] else Path()
    for word in (path.parent.name, path.stem):
        if word in STAGES:
            return f"fine_dist.{word}"
    from fine_dist.config import load
    from fine_dist.worker import config_class, import_module

    fitting = []
    for name in STAGES if path.is_file() else ():
        try:
            load(config_class(import_module(f"fine_dist.{name}")), path)
        except FineDistError:
            continue
        fitting.append(f"fine_dist.{name}")
    if len(fitting) == 1:
        return fitting[0]
    raise ConfigError(f"--stage: which command is {path or 'this'} for? legal: {', '.join(STAGES)}")


if __name__ == "__main__":
    sys.exit(main())
