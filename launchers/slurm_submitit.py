"""SLURM through submitit: single jobs, and arrays for fan-outs.

submitit writes the sbatch script and a small pickle that refers to `WorkerCall` and a path. The job itself runs the job
file on disk with the code that was copied at submission.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fine_dist.core.config import load
from fine_dist.core.errors import EXIT_RESUME, LaunchError
from fine_dist.core.processes import int_from_env
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers import worker
from fine_dist.launchers.launch_target import register
from fine_dist.launchers.launcher import Job, JobState, Launcher, stopped
from fine_dist.launchers.prepare import launch_of
from fine_dist.launchers.site import SlurmSite
from fine_dist.launchers.slurm_queue import (
    UNKNOWN_TO_CONTROLLER,
    fits_on,
    job_states,
    limits,
    nodes_of,
    outside_allocation,
    refuse_pattern,
    scheduler_message,
    slurm,
    slurm_findings,
)
from fine_dist.launchers.spec import Finding, JobSpec
from fine_dist.launchers.state_table import Submissions

if TYPE_CHECKING:
    from submitit import SlurmExecutor

log = logging.getLogger(__name__)

LOST_AFTER_S = 30.0
"""Seconds after which a job that only the accounting knows counts as lost."""
SIGNAL_S = 120
"""Seconds before the time limit at which a job is asked to save."""
GPU_OPTIONS = {"gpus-per-node", "gres", "gpus-per-task", "gpus"}
"""Options of sbatch that request accelerators; one in `launch.slurm` replaces the site's."""


@register
class SlurmLauncher(Launcher):
    """Jobs of the SLURM cluster, which outlive this process.

    Args:
        needs: Partition, account and restarts of the jobs. None: the cluster's defaults.
    """

    name = "slurm"
    detached = True
    max_restarts = 0  # a job puts itself back into the queue

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        super().__init__(needs)
        self._limits = limits(self.needs.partition)
        self._site = SlurmSite.here()
        self._next_poll = 0.0
        self._width = sys.maxsize
        self._states: dict[str, tuple[JobState, int | None, str]] = {}
        # time.monotonic() when the controller first did not know a job, by job id.
        self._unknown_since: dict[str | None, float] = {}

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        return "SLURM_JOB_ID" not in os.environ  # inside an allocation, jobs are its steps

    def fits(self, spec: JobSpec) -> int:
        """Number of such jobs that the nodes of the partition run at once, other users' jobs not counted."""
        return fits_on(nodes_of(self._limits.partition), spec)

    def submit_many(self, specs: Sequence[JobSpec], max_parallel: int | None = None, retries: int = 0) -> list[Job]:
        """Submit arrays, in chunks because MaxArraySize bounds the index. If sbatch refuses one, all are cancelled."""
        jobs = [self._job(spec, retries) for spec in specs]
        # All tasks of an array have the same resources.
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            groups.setdefault(repr(self._parameters(job.spec, "", None)), []).append(job)
        chunks = [
            group[i : i + self._limits.array]
            for group in groups.values()
            for i in range(0, len(group), self._limits.array)
        ]
        try:
            for chunk in chunks:
                self._submit(chunk, max_parallel)
        except BaseException:
            # Otherwise the next command would submit the part of the fan-out that is queued a second time.
            self._scancel([job.id for job in jobs if job.id])
            raise
        self._live += jobs
        return jobs

    def poll(self) -> None:
        """As in `Launcher`, but the scheduler is asked at most every 0.5 s, or every 2 s for 100 jobs or more."""
        if time.monotonic() >= self._next_poll:
            # One call of squeue covers all jobs of this poll.
            self._states = job_states([job.id for job in self._live if job.id])
            super().poll()
            self._next_poll = time.monotonic() + (0.5 if len(self._live) < 100 else 2.0)

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        with tempfile.TemporaryDirectory() as folder:
            executor = self._executor(spec, Path(folder), spec.name, self.needs.max_parallel)
            if many:
                # With a map count, submitit adds `--array`, which a partition may limit.
                executor.parameters["map_count"] = 1
            script = Path(folder, "request.sh")
            script.write_text(executor._make_submission_file_text("true", "request"), encoding="utf-8")
            return slurm_findings(spec, self.needs, [str(script)])

    def alive(self, submissions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        ids = [job for job in submissions if re.fullmatch(r"\d+(_\d+)?", job)]
        states = job_states(ids)
        return {job: [*submissions[job]] for job in ids if states[job][0] in ("pending", "running")}

    def close(self) -> None:
        """Submitted jobs belong to the scheduler and continue."""

    def _start(self, job: Job) -> None:
        self._submit([job], None)
        self._next_poll = 0.0

    def _check(self, job: Job) -> bool:
        state, code, reason = self._states.get(job.id or "", ("running", None, ""))
        if reason != UNKNOWN_TO_CONTROLLER:
            self._unknown_since.pop(job.id, None)
        elif time.monotonic() - self._unknown_since.setdefault(job.id, time.monotonic()) > LOST_AFTER_S:
            job.code, job.reason = None, "lost: SLURM's controller does not know it any more"
            return True
        if state in ("pending", "running"):
            job.state = state
            return False
        job.code = code
        job.reason = reason or None
        return True

    def _stop(self, job: Job) -> None:
        self._scancel([job.id])

    def _scancel(self, ids: Sequence[str | None]) -> None:
        if ids:
            slurm("scancel", *[i for i in ids if i])

    def _submit(self, jobs: list[Job], max_parallel: int | None) -> None:
        import submitit

        spec = jobs[0].spec
        refuse_pattern(spec.table or spec.run_dir)
        folder = Path(spec.table or spec.run_dir) / "logs" / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        name = spec.name if len(jobs) == 1 else spec.module.rpartition(".")[2]
        # submitit leaves its pickles behind when sbatch refuses. Their names
        # are random, so they are identified as the new files of the folder.
        before = set(folder.iterdir())
        with outside_allocation():
            try:
                executor = self._executor(spec, folder, name, max_parallel)
                calls = [WorkerCall(str(job.file), self.needs.max_restarts) for job in jobs]
                handles = executor.map_array(_call, calls)
            except (RuntimeError, ValueError, OSError, submitit.core.utils.FailedJobError) as error:
                for pickle in set(folder.iterdir()) - before:
                    pickle.unlink()
                raise LaunchError(f"sbatch refused {spec.name}: {scheduler_message(str(error))}") from None
        for job, handle in zip(jobs, handles):
            job.id = handle.job_id
            # submitit derives the name from the job id, which is known only now.
            job.scheduler_log = folder / f"{handle.job_id}_0_log.out"
            job.state, job.attempts = "pending", job.attempts or 1

    def _executor(self, spec: JobSpec, folder: Path, name: str, max_parallel: int | None) -> SlurmExecutor:
        import submitit

        python = shlex.join([*shlex.split(self._site.wrapper), sys.executable])
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=self.needs.max_restarts, python=python)
        executor.update_parameters(**self._parameters(spec, name, max_parallel))
        return executor

    def _parameters(self, spec: JobSpec, name: str, max_parallel: int | None) -> dict[str, object]:
        extra = {key.replace("_", "-"): value for key, value in spec.extras.get("slurm", {}).items()}
        minutes = spec.minutes or self._limits.minutes
        code = spec.code or spec.cwd
        gpus = {}
        if spec.accelerators_per_node and not GPU_OPTIONS & extra.keys():
            option, _, count = self._site.gpu_flag(spec.accelerators_per_node, spec.processes_per_node).partition("=")
            gpus = {option.removeprefix("--"): count}
        # --export=ALL overrides SBATCH_EXPORT and SLURM_EXPORT_ENV for the job and its step.
        srun_args = ["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={spec.cpus_per_process}"]
        pythonpath = f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}"
        options: dict[str, object] = {
            "job_name": name,
            "time": minutes,
            "nodes": spec.nodes,
            "ntasks_per_node": spec.processes_per_node,
            "cpus_per_task": spec.cpus_per_process,
            "partition": self.needs.partition,
            "account": self.needs.account,
            "mem": f"{round(spec.memory_gb * 1024)}M" if spec.memory_gb else None,
            "signal_delay_s": min(SIGNAL_S, minutes * 30),
            "stderr_to_stdout": True,
            "array_parallelism": max_parallel or 1000,
            "srun_args": [*srun_args, *self._site.srun_args],
            "setup": [*self._site.setup_lines(), pythonpath],
            "additional_parameters": {"requeue": True, "export": "ALL", "chdir": code, **gpus, **extra},
        }
        return {key: value for key, value in options.items() if value is not None}


@dataclass(frozen=True)
class WorkerCall:
    """The function that submitit calls in each task of the job: it runs the job file.

    If that ends with code 75, rank 0 requeues the job, unless there is a file STOP.
    """

    file: str
    """The job file."""
    max_restarts: int
    """Maximum number of times that the job goes back into the queue."""

    def __call__(self) -> None:
        code = worker.run_job(self.file)
        if code == EXIT_RESUME and not stopped(JobSpec.load(self.file)):
            # Rank 0 requeues the job; the other ranks wait until that ends them.
            if worker.rank() == 0:
                requeue(self.file, self.max_restarts)
            time.sleep(30)  # the requeue ends this process; exiting now would fail the step, and with it the job
        if code:
            raise SystemExit(code)


def _call(call: WorkerCall) -> None:
    call()  # a function with one argument, as `map_array` requires


RESTARTS = "FINE_DIST_RESTARTS"
"""Environment variable: number of times the job was submitted again, on sites without `scontrol requeue`."""


def requeue(file: str, max_restarts: int) -> None:
    """Requeue this job, or submit it again if the site does not allow requeues.

    Args:
        file: The job file.
        max_restarts: Maximum number of times.

    Raises:
        SystemExit: With code 75 if the job was submitted again, was cancelled, or was restarted too often.
    """
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    # A cancelled job gets the same signal as a job at its time limit, but must not be requeued.
    state = slurm("squeue", "-h", "-j", job, "-o", "%T").strip()
    restarts = int_from_env(env, "SLURM_RESTART_COUNT", 0) + int_from_env(env, RESTARTS, 0)
    if state != "RUNNING":
        _exit_resume(f"the job is {state or 'gone'}: not requeued")
    if restarts >= max_restarts:
        _exit_resume(f"restarted {max_restarts} times already; the same command continues it")
    if SlurmSite.here().requeues:
        log.info("saved; requeued")
        slurm("scontrol", "requeue", job)
        return
    # SLURM counts the restarts of a job that is submitted again from 0; the variable keeps the sum.
    env[RESTARTS] = str(restarts + 1)
    next_job = resubmit(JobSpec.load(file))
    _exit_resume(f"saved; continues as job {next_job}")


def resubmit(spec: JobSpec) -> str | None:
    """Submit a job again; returns its new id."""
    config = load(worker.config_class(worker.import_module(spec.module)), spec.config)
    launcher = SlurmLauncher(launch_of(config))
    job = launcher.submit(spec)
    Submissions(spec.table or spec.run_dir).add({str(job.id): [*spec.rows]})
    return job.id


def _exit_resume(reason: str) -> None:
    log.info("%s", reason)
    raise SystemExit(EXIT_RESUME)
