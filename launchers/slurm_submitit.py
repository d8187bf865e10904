"""SLURM through submitit: jobs submit themselves, a fan-out becomes arrays.

submitit writes the sbatch script and keeps its own small pickle, which names `WorkerCall` and a path; what runs is the
job file on disk, with the code that was copied when it was submitted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_dist import worker
from fine_dist.config import LaunchConfig
from fine_dist.errors import EXIT_RESUME, LaunchError
from fine_dist.jobs import Finding, JobSpec
from fine_dist.submit import sbatch_flags
from launchers.base import EXIT_INTERRUPTED, Job, JobState, Launcher

SIGNAL_S = 120
"""Seconds before the time limit at which a job is told to save."""
PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "RESIZING", "SIGNALING", "STOPPED"}


def slurm_launcher(needs: LaunchConfig | None = None) -> Launcher:
    """Steps of the allocation this process is in, or jobs of their own."""
    if os.environ.get("SLURM_JOB_ID"):
        from launchers.slurm_steps import StepLauncher

        return StepLauncher()
    return SlurmLauncher(needs)


class SlurmLauncher(Launcher):
    """Jobs of their own, which live on when this process ends.

    needs: the partition, account and restarts of the jobs; None: the cluster's defaults.
    """

    name = "slurm"
    detached = True
    max_restarts = 0  # a job puts itself back into the queue

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        super().__init__()
        self._needs = needs or LaunchConfig()
        self._limits = limits(self._needs.partition)
        self._next_look = 0.0
        self._width = sys.maxsize

    def fits(self, spec: JobSpec) -> int:
        return sys.maxsize

    def submit_many(self, specs: Sequence[JobSpec], max_parallel: int | None = None, retries: int = 0) -> list[Job]:
        """Arrays, chunked because MaxArraySize bounds the index. All are accepted by sbatch, or none."""
        jobs = [self._job(spec, retries) for spec in specs]
        # One array has one set of resources.
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            groups.setdefault(repr(self._parameters(job.spec, None)), []).append(job)
        chunks = [
            group[i : i + self._limits.array]
            for group in groups.values()
            for i in range(0, len(group), self._limits.array)
        ]
        try:
            for chunk in chunks:
                self._submit(chunk, max_parallel)
        except BaseException:
            self._scancel([job.id for job in jobs if job.id])
            raise
        self._live += jobs
        return jobs

    def poll(self) -> None:
        """As any launcher; the scheduler is asked once in two seconds."""
        if time.monotonic() >= self._next_look:
            self._seen = job_states([job.id for job in self._live if job.id])
            super().poll()
            self._next_look = time.monotonic() + (0.5 if len(self._live) < 100 else 2.0)

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        return slurm_findings(spec, self._needs)

    def alive(self, submissions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        ids = [job for job in submissions if re.fullmatch(r"\d+(_\d+)?", job)]
        states = job_states(ids)
        return {job: [*submissions[job]] for job in ids if states[job][0] in ("pending", "running")}

    def close(self) -> None:
        """Submitted jobs are the scheduler's."""

    def _start(self, job: Job) -> None:
        self._submit([job], None)
        self._next_look = 0.0

    def _check(self, job: Job) -> bool:
        state, code, words = self._seen.get(job.id or "", ("running", None, ""))
        if state in ("pending", "running"):
            job.state = state
            return False
        job.code = code
        job.reason = words or None
        return True

    def _stop(self, job: Job) -> None:
        self._scancel([job.id])

    def _scancel(self, ids: Sequence[str | None]) -> None:
        if ids:
            slurm("scancel", *[i for i in ids if i])

    def _submit(self, jobs: list[Job], max_parallel: int | None) -> None:
        import submitit

        spec = jobs[0].spec
        folder = Path(spec.table or spec.run_dir) / "logs" / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        with _outside_allocation():
            try:
                executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=self._needs.max_restarts)
                executor.update_parameters(**self._parameters(spec, max_parallel))
                calls = [WorkerCall(str(job.file), self._needs.max_restarts) for job in jobs]
                handles = executor.map_array(_call, calls)
            except (RuntimeError, ValueError, OSError, submitit.core.utils.FailedJobError) as error:
                for stray in set(folder.iterdir()) - before:
                    stray.unlink()
                raise LaunchError(f"sbatch refused {spec.name}: {_scheduler_words(str(error))}") from None
        for job, handle in zip(jobs, handles):
            job.id = handle.job_id
            job.own_log = folder / f"{handle.job_id}_0_log.out"
            job.state, job.attempts = "pending", job.attempts or 1

    def _parameters(self, spec: JobSpec, max_parallel: int | None) -> dict[str, Any]:
        extra = {key.replace("_", "-"): value for key, value in spec.extras.get("slurm", {}).items()}
        minutes = spec.minutes or self._limits.minutes
        code = spec.code or spec.cwd
        wanted: dict[str, Any] = {
            "job_name": spec.name if max_parallel is None else spec.module.rpartition(".")[2],
            "time": minutes,
            "nodes": spec.nodes,
            "ntasks_per_node": spec.processes_per_node,
            "cpus_per_task": spec.cpus_per_process,
            "partition": self._needs.partition,
            "account": self._needs.account,
            "mem": f"{round(spec.memory_gb * 1024)}M" if spec.memory_gb else None,
            "gpus_per_node": int(-(-spec.accelerators_per_node // 1)) or None,
            "signal_delay_s": min(SIGNAL_S, minutes * 30),
            "stderr_to_stdout": True,
            "array_parallelism": max_parallel or 1000,
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={spec.cpus_per_process}"],
            "setup": [f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}"],
            "additional_parameters": {"requeue": True, "chdir": code, **extra},
        }
        return {key: value for key, value in wanted.items() if value is not None}


@dataclass(frozen=True)
class WorkerCall:
    """What a task of the job does: run the job file; on exit code 75 rank 0 puts the job back into the queue."""

    file: str
    max_restarts: int

    def __call__(self) -> None:
        code = worker.run_job(self.file)
        if code == EXIT_RESUME:
            if worker.rank() == 0:
                requeue(self.max_restarts)
            time.sleep(30)  # the requeue ends this process; to exit now would make the step, and the job, fail
        if code:
            raise SystemExit(code)


def _call(call: WorkerCall) -> None:
    call()


def requeue(max_restarts: int) -> None:
    """Put this job back into the queue, unless it was cancelled or has been put back too often. Exits otherwise."""
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    state = slurm("squeue", "-h", "-j", job, "-o", "%T").strip()
    if state != "RUNNING":
        raise SystemExit(EXIT_RESUME)
    if int(env.get("SLURM_RESTART_COUNT", "0")) >= max_restarts:
        print(f"restarted {max_restarts} times already; the same command continues it", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_RESUME)
    print("saved; back into the queue", file=sys.stderr, flush=True)
    slurm("scontrol", "requeue", job)


# --- asking the scheduler ------------------------------------------------------------------------------------------


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
        raise LaunchError(f"{command[0]}: {_scheduler_words(done.stderr or done.stdout)}")
    return done.stdout


@dataclass(frozen=True)
class Limits:
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


def limits(partition: str | None = None) -> Limits:
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
    return Limits(int(size[1]) if size else 1001, usual, longest, nodes, chosen, tuple(known))


def slurm_findings(spec: JobSpec, needs: LaunchConfig) -> list[Finding]:
    """What the scheduler would say to a job, without submitting it."""
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
    words = ["sbatch", "--test-only", *sbatch_flags(spec, needs), "--wrap=true"]
    with _outside_allocation():
        said = subprocess.run(words, capture_output=True, text=True, check=False)
    if said.returncode and not found:
        remedy = f"check launch.partition ({', '.join(known.partitions)}), nodes, gpus, memory_gb and launch.slurm"
        found.append(Finding("slurm", "stop", f"{_scheduler_words(said.stderr)}; {remedy}"))
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
                found.setdefault(name, _verdict(state.split()[0], int(code), int(number or 0)))
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


def _scheduler_words(text: str) -> str:
    """The lines that SLURM's commands wrote, without Python's traceback around them."""
    lines = [
        line.strip() for line in text.splitlines() if re.match(r"\s*(sbatch|srun|slurm\w*|scontrol|squeue): ", line)
    ]
    return "; ".join(dict.fromkeys(lines)) or text.strip()[-500:]


@contextlib.contextmanager
def _outside_allocation() -> Iterator[None]:
    """Without the words of a job this process may be in: sbatch would take some of them as options."""
    hidden = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("SLURM_") and key != "SLURM_CONF"}
    try:
        yield
    finally:
        os.environ.update(hidden)
