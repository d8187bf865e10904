"""SLURM through submitit: jobs submit themselves, a fan-out becomes arrays.

submitit writes the sbatch script and keeps its own small pickle, which names `WorkerCall` and a path; what runs is the
job file on disk, with the code that was copied when it was submitted.
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
from typing import Any

from fine_dist.core.config import load
from fine_dist.core.errors import EXIT_RESUME, LaunchError
from fine_dist.core.processes import number_in
from fine_dist.core.settings import LaunchConfig
from launchers import worker
from launchers.base import Job, Launcher, stopped
from launchers.prepare import launch_of
from launchers.site import SlurmSite
from launchers.slurm_queue import (
    GHOST,
    fits_on,
    job_states,
    limits,
    nodes_of,
    outside_allocation,
    scheduler_words,
    slurm,
    slurm_findings,
)
from launchers.spec import Finding, JobSpec
from launchers.state_table import Submissions

log = logging.getLogger(__name__)

GHOST_S = 30.0
"""Seconds after which a job that only the accounting believes in counts as lost."""
SIGNAL_S = 120
"""Seconds before the time limit at which a job is told to save."""


class SlurmLauncher(Launcher):
    """Jobs of their own, which live on when this process ends.

    needs: the partition, account and restarts of the jobs; None: the cluster's defaults.
    """

    name = "slurm"
    detached = True
    max_restarts = 0  # a job puts itself back into the queue

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        super().__init__(needs)
        self._limits = limits(self.needs.partition)
        self._site = SlurmSite.here()
        self._next_look = 0.0
        self._width = sys.maxsize
        self._ghosts: dict[str | None, float] = {}

    def fits(self, spec: JobSpec) -> int:
        """What the partition's nodes hold, whatever else waits for them."""
        return fits_on(nodes_of(self._limits.partition), spec)

    def submit_many(self, specs: Sequence[JobSpec], max_parallel: int | None = None, retries: int = 0) -> list[Job]:
        """Arrays, chunked because MaxArraySize bounds the index. All are accepted by sbatch, or none."""
        jobs = [self._job(spec, retries) for spec in specs]
        # One array has one set of resources.
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
        with tempfile.TemporaryDirectory() as folder:
            executor = self._executor(spec, Path(folder), spec.name, self.needs.max_parallel)
            if many:
                executor.parameters["map_count"] = 1
            script = Path(folder, "request.sh")
            script.write_text(executor._make_submission_file_text("true", "request"))
            return slurm_findings(spec, self.needs, [str(script)])

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
        if words != GHOST:
            self._ghosts.pop(job.id, None)
        elif time.monotonic() - self._ghosts.setdefault(job.id, time.monotonic()) > GHOST_S:
            job.code, job.reason = None, "lost: the controller has forgotten it"
            return True
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
        name = spec.name if len(jobs) == 1 else spec.module.rpartition(".")[2]
        before = set(folder.iterdir())
        with outside_allocation():
            try:
                executor = self._executor(spec, folder, name, max_parallel)
                calls = [WorkerCall(str(job.file), self.needs.max_restarts) for job in jobs]
                handles = executor.map_array(_call, calls)
            except (RuntimeError, ValueError, OSError, submitit.core.utils.FailedJobError) as error:
                for stray in set(folder.iterdir()) - before:
                    stray.unlink()
                raise LaunchError(f"sbatch refused {spec.name}: {scheduler_words(str(error))}") from None
        for job, handle in zip(jobs, handles):
            job.id = handle.job_id
            job.own_log = folder / f"{handle.job_id}_0_log.out"
            job.state, job.attempts = "pending", job.attempts or 1

    def _executor(self, spec: JobSpec, folder: Path, name: str, max_parallel: int | None) -> Any:
        import submitit

        python = shlex.join([*shlex.split(self._site.wrapper), sys.executable])
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=self.needs.max_restarts, python=python)
        executor.update_parameters(**self._parameters(spec, name, max_parallel))
        return executor

    def _parameters(self, spec: JobSpec, name: str, max_parallel: int | None) -> dict[str, Any]:
        extra = {key.replace("_", "-"): value for key, value in spec.extras.get("slurm", {}).items()}
        minutes = spec.minutes or self._limits.minutes
        code = spec.code or spec.cwd
        setup = [f"source {shlex.quote(str(self._site.file))}"] if self._site.file else []
        gpus = {}
        if spec.accelerators_per_node and not {"gpus-per-node", "gres", "gpus-per-task", "gpus"} & extra.keys():
            flag = self._site.gpu_flag(spec.accelerators_per_node, spec.processes_per_node)
            gpus = dict([flag.removeprefix("--").split("=", 1)])
        wanted: dict[str, Any] = {
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
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={spec.cpus_per_process}", *self._site.srun_args],
            "setup": [*setup, f"export PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}"],
            "additional_parameters": {"requeue": True, "chdir": code, **gpus, **extra},
        }
        return {key: value for key, value in wanted.items() if value is not None}


@dataclass(frozen=True)
class WorkerCall:
    """What a task of the job does: run the job file; on exit code 75 rank 0 puts the job back into the queue,
    unless somebody left a file STOP."""

    file: str
    max_restarts: int

    def __call__(self) -> None:
        code = worker.run_job(self.file)
        if code == EXIT_RESUME and not stopped(JobSpec.load(self.file)):
            if worker.rank() == 0:
                requeue(self.file, self.max_restarts)
            time.sleep(30)  # the requeue ends this process; to exit now would make the step, and the job, fail
        if code:
            raise SystemExit(code)


def _call(call: WorkerCall) -> None:
    call()


RESTARTS = "FINE_DIST_RESTARTS"
"""How often a job was submitted again, where `scontrol requeue` is not allowed."""


def requeue(file: str, max_restarts: int) -> None:
    """Put this job back into the queue, or submit it again where the site does not allow that.

    Exits with 75 when it was submitted again, was cancelled or has been put back too often.
    """
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    state = slurm("squeue", "-h", "-j", job, "-o", "%T").strip()
    restarts = number_in(env, "SLURM_RESTART_COUNT", 0) + number_in(env, RESTARTS, 0)
    if state != "RUNNING":
        _leave(f"the job is {state or 'gone'}: not requeued")
    if restarts >= max_restarts:
        _leave(f"restarted {max_restarts} times already; the same command continues it")
    if SlurmSite.here().requeues:
        log.info("saved; back into the queue")
        slurm("scontrol", "requeue", job)
        return
    env[RESTARTS] = str(restarts + 1)
    again = resubmit(JobSpec.load(file))
    _leave(f"saved; goes on as job {again}")


def resubmit(spec: JobSpec) -> str | None:
    """Submit a job once more; the scheduler's name of it."""
    config = load(worker.config_class(worker.import_module(spec.module)), spec.config)
    launcher = SlurmLauncher(launch_of(config))
    job = launcher.submit(spec)
    Submissions(spec.table or spec.run_dir).add({str(job.id): [*spec.rows]})
    return job.id


def _leave(words: str) -> None:
    log.info(words)
    raise SystemExit(EXIT_RESUME)
