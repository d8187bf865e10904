"""The Python side of the scripts in `slurm/`: options of sbatch, tickets, and a fan-out inside one job.

A ticket is a file of shell variables that describes one submission: its job file or list of job files, its copy of the
code and the options of sbatch. `slurm/env.sh` sources it. A job's comment names its ticket, so that a requeued job runs
the code and config that it began with.
"""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import load, run_dir_of
from fine_dist.core.files import write_atomic
from fine_dist.core.processes import stop_on_signals
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.code_snapshot import code_root, snapshot
from fine_dist.launchers.entry import launch
from fine_dist.launchers.preflight import check_job, refuse
from fine_dist.launchers.prepare import (
    fans_out,
    is_done,
    job_file,
    launch_of,
    make_spec,
    make_specs,
    short_hash,
    tasks_of,
)
from fine_dist.launchers.site import SlurmSite
from fine_dist.launchers.slurm_queue import refuse_pattern, slurm_findings
from fine_dist.launchers.slurm_submitit import GPU_OPTIONS, SlurmLauncher
from fine_dist.launchers.spec import JobSpec
from fine_dist.launchers.state_table import StateTable
from fine_dist.launchers.worker import config_class, import_module


def prepare(module: str, argv: list[str], one_job: bool = False) -> Path:
    """Check a command line and write the files that its jobs need.

    In the ticket, JOB is the file of a single job. For a fan-out, LIST is a file with the paths of TASKS job files, one
    on each line. FLAGS are the options of sbatch.

    Args:
        module: Importable name of the stage's module.
        argv: Its command line.
        one_job: Whether a fan-out becomes one job, whose tasks are determined when it starts and run as its steps.

    Returns:
        Path of the ticket.

    Raises:
        ConfigError: The command line is wrong.
        LaunchError: The preflight found that the job cannot work.
        RunDirError: Another process starts tasks of this fan-out.
    """
    config = parse(config_class(import_module(module)), argv, prog=f"python -m {module}").config
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    refuse_pattern(run_dir)
    many = fans_out(module)
    spread_out = one_job and many
    spec = make_spec(module, config, write=False)
    capacity = SlurmLauncher(needs).capacity(spec, many and not one_job)
    # With `--spread` the tasks depend on results that do not exist
    # yet (a learngene), so they are listed when the job starts.
    tasks = None if spread_out else tasks_of(module, config, capacity)
    slots = math.ceil((needs.max_parallel or spec.nodes) / spec.nodes) if spread_out else 1
    flags = sbatch_flags(spec, needs, slots)
    # The test submission of a fan-out is an array too, because a partition may refuse arrays.
    array = ["--array=0"] if tasks else []
    first = tasks[0].config if tasks else config
    task = make_spec(module, first, write=False)
    findings = check_job(module, first, task, None, many=many, light=many, capacity=capacity)
    refuse(needs, [*findings, *slurm_findings(spec, needs, [*flags, *array, "--wrap=true"])])
    code = str(snapshot(run_dir, module)) if needs.snapshot else code_root(module)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    name = module.rpartition(".")[2]
    spec = make_spec(module, config, code=code)
    if tasks is None:
        variables = {"JOB": str(spec.save(job_file(spec))), "TASKS": "0", "LIST": ""}
    else:
        table = StateTable(run_dir)
        with table.driver("sbatch"):
            specs = [part for part in make_specs(module, config, tasks, code=code) if not is_done(table, part)]
        files = "".join(f"{job_file(part)}\n" for part in specs)
        listed = write_atomic(run_dir / "jobs" / f"{name}-{short_hash(files)}.list", files)
        variables = {"JOB": "", "TASKS": str(len(specs)), "LIST": str(listed)}
    # The ticket has all facts about the job, because a requeued job reads it when the command line is not available.
    variables |= {"NAME": name, "RUN_DIR": str(run_dir), "CODE": code, "PARALLEL": str(needs.max_parallel or "")}
    variables |= {"WANT_NODES": str(spec.nodes), "PROCS": str(spec.processes_per_node)}
    variables["SPREAD"] = "1" if spread_out else ""
    lines = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
    lines.append(f"FLAGS=({shlex.join(flags)})")
    text = "\n".join(lines) + "\n"
    # The name has a hash of the content, so that a second submission does not change the tickets of waiting jobs.
    return write_atomic(run_dir / "jobs" / f"{name}-{short_hash(text)}.sh", text)


def sbatch_flags(spec: JobSpec, needs: LaunchConfig, slots: int = 1) -> list[str]:
    """The options of sbatch for a job. Options in `launch.slurm` come last, because sbatch takes the last value.

    Args:
        spec: The job.
        needs: Its `launch` settings.
        slots: Number of SLURM tasks on each node; each runs one torchrun, or one step of a fan-out at a time.
    """
    flags = [f"--nodes={spec.nodes}", f"--ntasks-per-node={slots}"]
    flags.append(f"--cpus-per-task={spec.processes_per_node * spec.cpus_per_process}")
    stated = {key.replace("_", "-") for key in needs.slurm}
    if spec.accelerators_per_node and not stated & GPU_OPTIONS:
        flags.append(SlurmSite.here().gpu_flag(spec.accelerators_per_node * slots, slots))
    if spec.memory_gb:  # in MiB, because sbatch takes whole numbers only
        flags.append(f"--mem={math.ceil(spec.memory_gb * 1024 * slots)}M")
    if spec.minutes:
        flags.append(f"--time={spec.minutes}")
    flags += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(needs, key))]
    return [*flags, *(f"--{key.replace('_', '-')}={value}" for key, value in needs.slurm.items())]


def spread(file: str) -> int:
    """Run a fan-out as steps of the allocation that this process is in.

    Args:
        file: Job file of the fan-out.

    Returns:
        The exit code of `launch`.

    Raises:
        ResumeLater: A signal arrived. The steps have saved, and the command ends with code 75.
    """
    spec = JobSpec.load(file)
    os.chdir(spec.cwd)
    config = load(config_class(import_module(spec.module)), spec.config)
    if "launch" in type(config).model_fields:  # `nodes` was the size of the allocation; each task runs on one node
        config = config.model_copy(update={"launch": launch_of(config).model_copy(update={"nodes": 1})})
    with stop_on_signals():
        return launch(spec.module, config, "slurm")
