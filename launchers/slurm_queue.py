"""Asking SLURM: its limits, what became of jobs, what it would say to one."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fine_dist.core.errors import EXIT_INTERRUPTED, LaunchError
from fine_dist.core.settings import LaunchConfig
from launchers.base import JobState
from launchers.spec import Finding, JobSpec

PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT"}
GHOST = "alive in the accounting only"
"""Said of a job that the controller does not know: it was lost in a crash, or has ended a moment ago."""
RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED"}


def slurm(*command: str) -> str:
    """Output of one of SLURM's commands. `LaunchError` with the scheduler's words when it fails."""
    if not shutil.which(command[0]):
        raise LaunchError(f"{command[0]} is not on this machine's PATH; submit from a login node of the SLURM cluster")
    for _ in range(10):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Unable to contact" not in done.stderr and "timed out" not in done.stderr:
            break
        time.sleep(2)  # the controller is restarting; jobs go on without it
    if done.returncode:
        raise LaunchError(f"{command[0]}: {scheduler_words(done.stderr or done.stdout)}")
    return done.stdout


@dataclass(frozen=True)
class PartitionLimits:
    """What a cluster allows."""

    array: int
    """Largest number of tasks of one array."""
    minutes: int
    """Time limit of a job that states none."""
    max_minutes: int | None
    """Longest time limit of the partition; None: unlimited."""
    nodes: int
    """Nodes of the partition."""
    partition: str
    partitions: tuple[str, ...]


def limits(partition: str | None = None) -> PartitionLimits:
    """MaxArraySize and a partition's limits. The default partition's when there is no such one."""
    said = slurm("scontrol", "show", "config")
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.M)
    known = {}
    for line in slurm("scontrol", "show", "partition", "-o").splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in words:
            known[words["PartitionName"]] = words
    if partition is None or partition.split(",")[0] not in known:  # sbatch has the last word on a name
        chosen = next((name for name, words in known.items() if words.get("Default") == "YES"), next(iter(known), ""))
    else:
        chosen = partition.split(",")[0]
    words = known.get(chosen, {})
    longest = _minutes(words.get("MaxTime", ""))
    usual = _minutes(words.get("DefaultTime", "")) or longest or 24 * 60
    nodes = int(words.get("TotalNodes", "0"))
    # Indices 0 to MaxArraySize - 1 are legal.
    return PartitionLimits(int(size[1]) if size else 1001, usual, longest, nodes, chosen, tuple(known))


@dataclass(frozen=True)
class Node:
    """What one node has."""

    cpus: int
    memory_mb: int | None
    gpus: int


def nodes_of(partition: str) -> list[Node]:
    """The nodes of a partition that are not down."""
    said = slurm("sinfo", "-h", "-N", "-p", partition, "-o", "%c|%m|%G|%T")
    found = []
    for line in said.split():
        cpus, memory, generic, state = line.split("|")
        if not state.startswith(("down", "fail", "drain", "maint")):
            gpus = sum(int(n) for n in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", generic))
            found.append(Node(int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus))
    return found


def fits_on(nodes: Sequence[Node], spec: JobSpec) -> int:
    """How many such jobs those nodes hold at once; at least one, because a job waits for what it needs."""
    held = 0
    for node in nodes:
        capacity = node.cpus // (spec.processes_per_node * spec.cpus_per_process)
        if spec.accelerators_per_node:
            capacity = min(capacity, int(node.gpus // -(-spec.accelerators_per_node // 1)))
        if spec.memory_gb and node.memory_mb:
            capacity = min(capacity, int(node.memory_mb // (spec.memory_gb * 1024)))
        held += capacity
    return max(1, held // spec.nodes)


def slurm_findings(spec: JobSpec, needs: LaunchConfig, request: Sequence[str]) -> list[Finding]:
    """What the scheduler would say to a job, without submitting it.

    request: the words that sbatch will be given, script included.
    """
    found = []
    known = limits(needs.partition)
    if spec.minutes and known.max_minutes and spec.minutes > known.max_minutes:
        text = f"launch.minutes {spec.minutes} is over the {known.max_minutes} of partition {known.partition}; the job "
        found.append(
            Finding("slurm", "stop", text + "would wait for ever. Lower it: jobs save and requeue at the limit")
        )
    if known.nodes and spec.nodes > known.nodes:
        text = (
            f"launch.nodes {spec.nodes}: partition {known.partition} has {known.nodes}; lower it, or another partition"
        )
        found.append(Finding("slurm", "stop", text))
    words = ["sbatch", "--test-only", *request]
    with outside_allocation():
        said = subprocess.run(words, capture_output=True, text=True, check=False)
    if said.returncode and not found:
        remedy = f"check launch.partition ({', '.join(known.partitions)}), nodes, gpus, memory_gb and launch.slurm"
        found.append(Finding("slurm", "stop", f"{scheduler_words(said.stderr)}; {remedy}"))
    about = f"partition {known.partition}: {known.nodes} nodes, at most {known.max_minutes or 'unlimited'} minutes"
    return [*found, Finding("slurm", "ok", f"{about}; arrays of up to {known.array} tasks")]


def _minutes(text: str) -> int | None:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    return (int(match[1] or 0) * 24 + int(match[2])) * 60 + int(match[3]) if match else None


def job_states(ids: Sequence[str]) -> dict[str, tuple[JobState, int | None, str]]:
    """State, exit code and the scheduler's word for it, by job id; a job nobody knows any more counts as lost."""
    found: dict[str, tuple[JobState, int | None, str]] = {}
    if not ids:
        return found
    heads = ",".join(sorted({i.partition("_")[0] for i in ids}))
    with contextlib.suppress(LaunchError):  # squeue refuses ids that it has forgotten; sacct knows them
        said = slurm(
            "squeue", "-h", "-r", "-t", "all", "-j", heads, "-O", "JobArrayID:60,State:30,exit_code:12,Reason:80"
        )
        for line in said.splitlines():
            words = line.split()
            status = int(words[2]) if words[2].isdecimal() else 0
            found[words[0]] = _verdict(words[1], status >> 8, status & 127)
    missing = [i for i in ids if i not in found]
    if missing:
        with contextlib.suppress(LaunchError):  # a cluster without accounting
            for line in slurm("sacct", "-n", "-X", "-P", "-j", heads, "-o", "JobID,State,ExitCode").splitlines():
                name, state, exit_code = line.split("|")
                code, _, number = exit_code.partition(":")
                verdict = _verdict(state.split()[0], int(code), int(number or 0))
                found.setdefault(name, verdict if verdict[0] not in ("pending", "running") else (*verdict[:2], GHOST))
    return {i: found.get(i, ("failed", None, "unknown to SLURM")) for i in ids}


def _verdict(word: str, code: int, number: int) -> tuple[JobState, int | None, str]:
    if word in PENDING:
        return "pending", None, ""
    if word in RUNNING:
        return "running", None, ""
    if word == "COMPLETED":
        return "done", 0, ""
    if word == "FAILED" and code:
        return "failed", code, ""
    if word == "CANCELLED":
        return "cancelled", EXIT_INTERRUPTED, ""
    return "failed", -number if number else None, f"SLURM says {word}"


def scheduler_words(text: str) -> str:
    """The lines that SLURM's commands wrote, without Python's traceback around them."""
    lines = [
        line.strip() for line in text.splitlines() if re.match(r"\s*(sbatch|srun|slurm\w*|scontrol|squeue): ", line)
    ]
    return "; ".join(dict.fromkeys(lines)) or text.strip()[-500:]


@contextlib.contextmanager
def outside_allocation() -> Iterator[None]:
    """Without the words of a job this process may be in: sbatch would take some of them as options."""
    hidden = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("SLURM_") and key != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(hidden)
