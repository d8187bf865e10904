"""Queries to SLURM: the limits of a partition, the states of jobs, and whether a job would be accepted."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fine_dist.core.errors import EXIT_INTERRUPTED, LaunchError
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.launcher import JobState
from fine_dist.launchers.spec import Finding, JobSpec

PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT"}
"""SLURM's states of jobs that wait, by the names of `squeue --helpstate`."""
RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED"}
"""SLURM's states of jobs that run."""
UNKNOWN_TO_CONTROLLER = "alive in the accounting only"
"""Reason of a job that is alive according to the accounting but unknown to the controller: the controller lost it in a
crash, or it has just ended."""


def slurm(*command: str) -> str:
    """The output of one of SLURM's commands.

    Raises:
        LaunchError: The command failed, or is not installed; the message quotes the scheduler.
    """
    if not shutil.which(command[0]):
        raise LaunchError(f"{command[0]} is not on this machine's PATH; submit from a login node of the SLURM cluster")
    for _ in range(10):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Unable to contact" not in done.stderr and "timed out" not in done.stderr:
            break
        time.sleep(2)  # the controller may be restarting, which does not affect running jobs
    if done.returncode:
        raise LaunchError(f"{command[0]}: {scheduler_message(done.stderr or done.stdout)}")
    return done.stdout


@dataclass(frozen=True)
class PartitionLimits:
    """The limits of a cluster and of one of its partitions."""

    array: int
    """Maximum number of tasks of one array."""
    minutes: int
    """Time limit in minutes of a job that states none."""
    max_minutes: int | None
    """Maximum time limit of the partition in minutes. None: unlimited."""
    nodes: int
    """Number of nodes of the partition."""
    partition: str
    """Name of the partition."""
    partitions: tuple[str, ...]
    """Names of all partitions."""


def limits(partition: str | None = None) -> PartitionLimits:
    """The limits of the cluster and of a partition, from `scontrol`.

    Args:
        partition: Name of the partition, or several joined by commas, of which the first is taken. None, or an unknown
            name: the default partition.

    Raises:
        LaunchError: As in `slurm`.
    """
    settings = slurm("scontrol", "show", "config")
    # The array limit is the cluster's, the others are the partition's.
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", settings, re.M)
    partitions = {}
    for line in slurm("scontrol", "show", "partition", "-o").splitlines():
        fields = dict(field.split("=", 1) for field in line.split() if "=" in field)
        if "PartitionName" in fields:
            partitions[fields["PartitionName"]] = fields
    if partition is None or partition.split(",")[0] not in partitions:  # sbatch itself refuses an unknown name
        defaults = (name for name, fields in partitions.items() if fields.get("Default") == "YES")
        name = next(defaults, next(iter(partitions), ""))
    else:
        name = partition.split(",")[0]
    fields = partitions.get(name, {})
    max_minutes = _minutes(fields.get("MaxTime", ""))
    minutes = _minutes(fields.get("DefaultTime", "")) or max_minutes or 24 * 60
    nodes = int(fields.get("TotalNodes", "0"))
    # Indices 0 to MaxArraySize - 1 are legal.
    return PartitionLimits(int(size[1]) if size else 1001, minutes, max_minutes, nodes, name, tuple(partitions))


@dataclass(frozen=True)
class Node:
    """The resources of one node."""

    cpus: int
    """Number of CPUs."""
    memory_mb: int | None
    """Memory in MiB. None: unknown."""
    gpus: int
    """Number of accelerators."""


def nodes_of(partition: str) -> list[Node]:
    """The nodes of a partition that are not down."""
    listing = slurm("sinfo", "-h", "-N", "-p", partition, "-o", "%c|%m|%G|%T")
    nodes = []
    for line in listing.split():
        cpus, memory, generic, state = line.split("|")
        if not state.startswith(("down", "fail", "drain", "maint")):
            # Generic resources read `gpu:a100:4(S:0-1),gpu:v100:2,shard:8`; only the counts of gpu are wanted.
            gpus = sum(int(n) for n in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", generic))
            # sinfo writes `64+` where nodes of one line differ, meaning at least 64.
            nodes.append(Node(int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus))
    return nodes


def fits_on(nodes: Sequence[Node], spec: JobSpec) -> int:
    """Number of such jobs that the nodes run at once; at least 1, because a job may wait for nodes."""
    total = 0
    for node in nodes:
        capacity = node.cpus // (spec.processes_per_node * spec.cpus_per_process)
        if spec.accelerators_per_node:
            capacity = min(capacity, int(node.gpus // -(-spec.accelerators_per_node // 1)))
        if spec.memory_gb and node.memory_mb:
            capacity = min(capacity, int(node.memory_mb // (spec.memory_gb * 1024)))
        total += capacity
    return max(1, total // spec.nodes)


def slurm_findings(spec: JobSpec, needs: LaunchConfig, request: Sequence[str]) -> list[Finding]:
    """Whether the scheduler would accept a job, without submitting it.

    Args:
        spec: The job.
        needs: Its `launch` settings.
        request: Arguments of sbatch, including the script.
    """
    findings = []
    bounds = limits(needs.partition)
    if spec.minutes and bounds.max_minutes and spec.minutes > bounds.max_minutes:
        text = (
            f"launch.minutes {spec.minutes} is over the {bounds.max_minutes} of partition {bounds.partition}: the job "
            "would wait forever; lower it: jobs save and requeue at the limit"
        )
        findings.append(Finding("slurm", "stop", text))
    if bounds.nodes and spec.nodes > bounds.nodes:
        text = (
            f"launch.nodes {spec.nodes}: partition {bounds.partition} has {bounds.nodes}; lower it or change partition"
        )
        findings.append(Finding("slurm", "stop", text))
    command = ["sbatch", "--test-only", *request]
    with outside_allocation():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not findings:
        remedy = f"check launch.partition ({', '.join(bounds.partitions)}), nodes, gpus, memory_gb and launch.slurm"
        findings.append(Finding("slurm", "stop", f"{scheduler_message(done.stderr)}; {remedy}"))
    about = f"partition {bounds.partition}: {bounds.nodes} nodes, at most {bounds.max_minutes or 'unlimited'} minutes"
    return [*findings, Finding("slurm", "ok", f"{about}; arrays of up to {bounds.array} tasks")]


def _minutes(text: str) -> int | None:
    """Minutes of a time such as `1-12:00:00`; None for other texts, such as `UNLIMITED`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    return (int(match[1] or 0) * 24 + int(match[2])) * 60 + int(match[3]) if match else None


def job_states(ids: Sequence[str]) -> dict[str, tuple[JobState, int | None, str]]:
    """State, exit code and reason of jobs, by job id. A job that SLURM does not know any more counts as failed."""
    states: dict[str, tuple[JobState, int | None, str]] = {}
    if not ids:
        return states
    # One query for all tasks of an array, because a thousand separate ones would overload the controller.
    heads = ",".join(sorted({i.partition("_")[0] for i in ids}))
    with contextlib.suppress(LaunchError):  # squeue refuses ids of jobs that ended long ago; sacct has them
        # `-r` gives each task of an array its own line; `-t all` includes jobs that have just ended.
        listing = slurm(
            "squeue", "-h", "-r", "-t", "all", "-j", heads, "-O", "JobArrayID:60,State:30,exit_code:12,Reason:80"
        )
        for line in listing.splitlines():
            job, state, wait_status = line.split()[:3]
            status = int(wait_status) if wait_status.isdecimal() else 0
            # As of wait(2): the exit code is in the upper byte, the signal in the lower seven bits.
            states[job] = _job_state(state, status >> 8, status & 127)
    missing = [i for i in ids if i not in states]
    if missing:
        with contextlib.suppress(LaunchError):  # a cluster without accounting
            for line in slurm("sacct", "-n", "-X", "-P", "-j", heads, "-o", "JobID,State,ExitCode").splitlines():
                name, state, exit_code = line.split("|")
                code, _, number = exit_code.partition(":")
                result = _job_state(state.split()[0], int(code), int(number or 0))
                # The controller does not list the job, but the accounting has it as alive: see `UNKNOWN_TO_CONTROLLER`.
                alive = result[0] in ("pending", "running")
                states.setdefault(name, (*result[:2], UNKNOWN_TO_CONTROLLER) if alive else result)
    return {i: states.get(i, ("failed", None, "unknown to SLURM")) for i in ids}


def _job_state(state: str, code: int, number: int) -> tuple[JobState, int | None, str]:
    """State, exit code and reason of a job from SLURM's state, exit code and signal number."""
    if state in PENDING:
        return "pending", None, ""
    if state in RUNNING:
        return "running", None, ""
    if state == "COMPLETED":
        return "done", 0, ""
    # A plain exit code gets no reason here; `launcher.explain` describes it.
    if state == "FAILED" and code:
        return "failed", code, ""
    if state == "CANCELLED":
        return "cancelled", EXIT_INTERRUPTED, ""
    return "failed", -number if number else None, f"SLURM says {state}"


def scheduler_message(text: str) -> str:
    """The lines that SLURM's commands wrote, without the traceback of a library around them."""
    lines = [
        line.strip() for line in text.splitlines() if re.match(r"\s*(sbatch|srun|slurm\w*|scontrol|squeue): ", line)
    ]
    return "; ".join(dict.fromkeys(lines)) or text.strip()[-500:]


@contextlib.contextmanager
def outside_allocation() -> Iterator[None]:
    """Hide the variables of the job that this process may be in, because sbatch takes some of them as options.

    SBATCH_EXPORT is hidden too: with NONE, which some sites set for everybody, jobs would start without the variables
    that name their code and their config.
    """
    # They are removed from the environment of this process, because submitit runs sbatch with that environment.
    hidden = {key: os.environ.pop(key) for key in list(os.environ) if _is_of_a_job(key)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_of_a_job(variable: str) -> bool:
    return (variable.startswith("SLURM_") and variable != "SLURM_CONF") or variable == "SBATCH_EXPORT"


def refuse_pattern(path: str | Path) -> None:
    """Refuse a run directory whose name SLURM would rewrite: `%` and `\\` are special in the paths of log files.

    Raises:
        LaunchError: The path holds one of them.
    """
    odd = next((char for char in "%\\" if char in str(path)), None)
    if odd:
        raise LaunchError(
            f"run_dir {path}: SLURM interprets {odd!r} in the paths of log files; choose a name without it"
        )
