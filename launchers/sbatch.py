"""For the scripts in `slurm/`: what sbatch is told, the ticket that `slurm/env.sh` reads, a fan-out inside one job."""

from __future__ import annotations

import math
import os
import shlex
import signal
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import load, run_dir_of
from fine_dist.core.errors import ResumeLater
from fine_dist.core.files import write_atomic
from fine_dist.core.settings import LaunchConfig
from launchers.code_snapshot import code_root, snapshot
from launchers.entry import launch
from launchers.preflight import preflight, refuse
from launchers.prepare import (
    fans_out,
    is_done,
    job_file,
    launch_of,
    make_spec,
    make_specs,
    short_hash,
    tasks_of,
)
from launchers.site import SlurmSite
from launchers.slurm_queue import slurm_findings
from launchers.slurm_submitit import SlurmLauncher
from launchers.spec import JobSpec
from launchers.state_table import StateTable
from launchers.worker import config_class, import_module


def prepare(module: str, argv: list[str], whole: bool = False) -> Path:
    """Write all that the jobs of a command line need; the ticket, a file of shell words that a script sources.

    JOB is one job's file; or TASKS files are listed in LIST, one a line. FLAGS are the sbatch options it asks for.

    whole: a fan-out is one job (SPREAD is set), whose tasks are found when it starts and run as steps of it.
    """
    config = parse(config_class(import_module(module)), argv, prog=f"python -m {module}").config
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    many = fans_out(module)
    spread_out = whole and many
    spec = make_spec(module, config, write=False)
    capacity = SlurmLauncher(needs).capacity(spec, many and not whole)
    tasks = None if spread_out else tasks_of(module, config, capacity)
    slots = math.ceil((needs.max_parallel or spec.nodes) / spec.nodes) if spread_out else 1
    flags = sbatch_flags(spec, needs, slots)
    array = ["--array=0"] if tasks else []
    first = tasks[0].config if tasks else config
    found = preflight(module, first, make_spec(module, first, write=False), light=many, capacity=capacity)
    refuse(needs, [*found, *slurm_findings(spec, needs, [*flags, *array, "--wrap=true"])])
    code = str(snapshot(run_dir, module)) if needs.snapshot else code_root(module)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    name = module.rpartition(".")[2]
    spec = make_spec(module, config, code=code)
    if tasks is None:
        words = {"JOB": str(spec.save(job_file(spec))), "TASKS": "0", "LIST": ""}
    else:
        table = StateTable(run_dir)
        with table.driver("sbatch"):
            specs = [part for part in make_specs(module, config, tasks, code=code) if not is_done(table, part)]
        files = "".join(f"{job_file(part)}\n" for part in specs)
        listed = write_atomic(run_dir / "jobs" / f"{name}-{short_hash(files)}.list", files)
        words = {"JOB": "", "TASKS": str(len(specs)), "LIST": str(listed)}
    words |= {"NAME": name, "RUN_DIR": str(run_dir), "CODE": code, "PARALLEL": str(needs.max_parallel or "")}
    words |= {"WANT_NODES": str(spec.nodes), "PROCS": str(spec.processes_per_node)}
    words["SPREAD"] = "1" if spread_out else ""
    lines = [f"{key}={shlex.quote(value)}" for key, value in words.items()]
    lines.append(f"FLAGS=({shlex.join(flags)})")
    text = "\n".join(lines) + "\n"
    return write_atomic(run_dir / "jobs" / f"{name}-{short_hash(text)}.sh", text)


def sbatch_flags(spec: JobSpec, needs: LaunchConfig, slots: int = 1) -> list[str]:
    """What a job needs as options of sbatch. slots: SLURM tasks a node, each with a torchrun or a step of a fan-out."""
    flags = [f"--nodes={spec.nodes}", f"--ntasks-per-node={slots}"]
    flags.append(f"--cpus-per-task={spec.processes_per_node * spec.cpus_per_process}")
    stated = {key.replace("_", "-") for key in needs.slurm}
    if spec.accelerators_per_node and not stated & {"gpus-per-node", "gres", "gpus-per-task", "gpus"}:
        flags.append(SlurmSite.here().gpu_flag(spec.accelerators_per_node * slots, slots))
    if spec.memory_gb:
        flags.append(f"--mem={math.ceil(spec.memory_gb * 1024 * slots)}M")
    if spec.minutes:
        flags.append(f"--time={spec.minutes}")
    flags += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(needs, key))]
    return [*flags, *(f"--{key.replace('_', '-')}={value}" for key, value in needs.slurm.items())]


def spread(file: str) -> int:
    """Inside an allocation: a fan-out as steps of it. A signal has the steps save, and ends with code 75."""

    def stop(number: int, frame: object) -> None:
        raise ResumeLater(f"received {signal.Signals(number).name}")

    spec = JobSpec.load(file)
    os.chdir(spec.cwd)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
    config = load(config_class(import_module(spec.module)), spec.config)
    if "launch" in type(config).model_fields:  # the nodes are the allocation's; a task has one
        config = config.model_copy(update={"launch": launch_of(config).model_copy(update={"nodes": 1})})
    return launch(spec.module, config, "slurm")
