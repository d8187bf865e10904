"""The base class of launchers: the queue of jobs and the retries that all of them share, and what exit codes mean."""

from __future__ import annotations

import signal
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from fine_dist.core.errors import EXIT_INTERRUPTED, EXIT_RESUME, EXIT_TASKS_FAILED, EXIT_USER_ERROR
from fine_dist.core.limits import GIB
from fine_dist.core.processes import stop_on_signals
from fine_dist.core.settings import LaunchConfig
from fine_dist.engine.run_dir import was_stopped
from fine_dist.launchers.launch_target import LaunchTarget
from fine_dist.launchers.prepare import job_file
from fine_dist.launchers.spec import Capacity, JobSpec
from fine_dist.launchers.worker import EXIT_BUSY

JobState = Literal["pending", "running", "done", "failed", "cancelled"]
FINAL_STATES = ("done", "failed", "cancelled")
STOPPED_BY_FILE = "stopped by a file STOP; the same command continues it"


@dataclass(eq=False)
class Job:
    """Handle of one submitted job. The launcher that submitted it updates the fields whenever it polls."""

    spec: JobSpec
    """What runs."""
    file: Path
    """JSON file of the spec."""
    state: JobState = "pending"
    """Last known state."""
    id: str | None = None
    """The scheduler's name of the job."""
    code: int | None = None
    """Exit code once the job has ended. Negative: killed by the signal of that number. None: the job was lost."""
    reason: str | None = None
    """Why the job failed, in the scheduler's words where there are any."""
    attempts: int = 0
    """Number of times the job was started and counted as an attempt."""
    retries: int = 0
    """Number of further attempts that are allowed."""
    restarts: int = 0
    """Number of times the job was started again without counting an attempt (exit code 75, a lost node)."""
    show: bool = False
    """Whether the output goes to this terminal instead of the log, if the launcher supports that."""
    handle: object = field(default=None, repr=False)
    """The launcher's own object for the running job."""
    scheduler_log: Path | None = None
    """Log file whose name the scheduler chose."""

    @property
    def log(self) -> Path:
        """File of the job's output."""
        return self.scheduler_log or Path(self.spec.run_dir) / "logs" / f"{self.spec.name}.log"

    @property
    def ended(self) -> bool:
        """Whether the job has reached its final state."""
        return self.state in FINAL_STATES


class Launcher(LaunchTarget):
    """Submits jobs and follows them. A subclass starts, polls and cancels single jobs; this class has the queue.

    Leaving the context manager cancels the jobs that still run.
    """

    max_restarts: ClassVar[int] = 20
    """Restarts of one job that do not count as attempts."""
    copies_code: ClassVar[bool] = True
    """Whether jobs run a copy of the code, as `launch.snapshot` says, or the installed code."""

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        super().__init__(needs)
        self._queue: deque[Job] = deque()
        self._live: list[Job] = []
        self._width = 1

    # --- interface for callers

    def runs_here(self, spec: JobSpec) -> bool:
        """Whether the command's own process can run a single such job."""
        return False

    def submit(self, spec: JobSpec, retries: int = 0, show: bool = False) -> Job:
        """Start one job now.

        Args:
            spec: The job.
            retries: Further attempts if it fails.
            show: Whether its output goes to this terminal, if the launcher supports that.

        Raises:
            LaunchError: The launcher cannot start such a job.
        """
        job = self._job(spec, retries)
        job.show = show
        self._begin(job)
        return job

    def warm(self, spec: JobSpec) -> None:
        """Prepare for jobs like this one in the background, while the caller still checks what is to run."""
        return

    def submit_many(self, specs: Sequence[JobSpec], max_parallel: int | None = None, retries: int = 0) -> list[Job]:
        """Submit many jobs. They are started by this and later calls of `poll`, as many at a time as fit.

        Args:
            specs: The jobs, of equal resources.
            max_parallel: Maximum number that run at the same time. None: as many as fit (`fits`).
            retries: Further attempts for each job.
        """
        jobs = [self._job(spec, retries) for spec in specs]
        self._queue.extend(jobs)
        # The limit holds for retries as well, so that they do not overload the machine.
        self._width = max_parallel or (self.fits(specs[0]) if specs else 1)
        self.poll()
        return jobs

    def status(self, job: Job) -> JobState:
        """The current state of a job."""
        if not job.ended:
            self.poll()
        return job.state

    def cancel(self, job: Job) -> None:
        """Stop a job and wait until it has ended. Does nothing if it has ended already."""
        if job in self._queue:
            self._queue.remove(job)
        if not job.ended:
            if job in self._live:
                self._live.remove(job)
                self._stop(job)
            job.state = "cancelled"

    def logs(self, job: Job) -> str:
        """The output of a job so far."""
        return job.log.read_text(encoding="utf-8", errors="replace") if job.log.exists() else ""

    def wait(self, jobs: Sequence[Job], tick: Callable[[], None] | None = None, every_s: float = 0.02) -> list[Job]:
        """Wait until all jobs have ended.

        When this process is interrupted or receives SIGTERM, SIGUSR1 or SIGUSR2, the jobs are asked to save and end,
        unless they outlive this process (`detached`).

        Args:
            jobs: The jobs to wait for.
            tick: Called about every 0.5 s.
            every_s: Seconds between two polls.

        Raises:
            ResumeLater: A signal arrived.
        """
        last = 0.0
        # Signals raise exceptions only while this waits for jobs. During a submission, they would interrupt it halfway.
        # The context includes the cancellation, because after a first signal it ignores further ones.
        with stop_on_signals():
            try:
                while True:
                    self.poll()
                    if tick and time.monotonic() - last > 0.5:
                        last = time.monotonic()
                        tick()
                    if all(job.ended for job in jobs):
                        return list(jobs)
                    time.sleep(every_s)
            except BaseException:
                if not self.detached:
                    # All jobs are asked to stop before `cancel` waits for the first, so that they save together.
                    for job in self._live:
                        self._request_stop(job)
                    for job in jobs:
                        self.cancel(job)
                raise

    def poll(self) -> None:
        """Update the running jobs, queue again those that may be retried, and start queued ones."""
        for job in list(self._live):
            if self._check(job):
                self._live.remove(job)
                self._finish(job)
        while self._queue and len(self._live) < self._width:
            job = self._queue.popleft()
            # Tested for each job, because a user may create the file STOP while earlier jobs still run.
            if job.spec.table and was_stopped(job.spec.table):
                job.state, job.code, job.reason = "cancelled", EXIT_RESUME, STOPPED_BY_FILE
            else:
                self._begin(job)

    def alive(self, submissions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Those of earlier submissions (task names by job id) that are still queued or running."""
        return {}

    def close(self) -> None:
        """Cancel the jobs that still run and free what the launcher holds."""
        for job in [*self._queue, *self._live]:
            self.cancel(job)

    def capacity(self, spec: JobSpec, many: bool = True) -> Capacity:
        """How many such jobs the launcher's machines run, and their memory; this machine is not one of them.

        Args:
            spec: One of the jobs.
            many: Whether there are several; a single job has its machines to itself.
        """
        memory = self.needs.gpu_memory_gb
        return Capacity(
            workers=self.fits(spec) if many else 1,
            accelerator_bytes=memory * GIB if memory and spec.accelerators_per_node else None,
            cpu=not spec.accelerators_per_node,
            host_bytes=spec.memory_gb * GIB if spec.memory_gb else None,
        )

    # --- methods that a launcher implements

    @abstractmethod
    def fits(self, spec: JobSpec) -> int:
        """Number of such jobs that the launcher's machines run at once."""

    @abstractmethod
    def _start(self, job: Job) -> None:
        """Start the job; set `handle` and `id`."""

    @abstractmethod
    def _check(self, job: Job) -> bool:
        """Whether the job has ended; if so, set `code` (and `reason`)."""

    @abstractmethod
    def _stop(self, job: Job) -> None:
        """End the job and wait for its end."""

    def _request_stop(self, job: Job) -> None:
        """Ask the job to save and end, without waiting."""

    # --- the queue

    def _job(self, spec: JobSpec, retries: int) -> Job:
        file = job_file(spec)
        if not file.is_file():  # the name is a hash of the content, so an existing file is equal
            spec.save(file)
        return Job(spec, file, retries=retries)

    def _begin(self, job: Job) -> None:
        job.attempts += 1
        job.state, job.code, job.reason = "running", None, None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._start(job)
        # Only after the start: `close` need not end a job that could not be started.
        self._live.append(job)

    def _finish(self, job: Job) -> None:
        if job.code == 0:
            job.state = "done"
            return
        if job.code == EXIT_RESUME and stopped(job.spec):
            job.state, job.reason = "cancelled", STOPPED_BY_FILE
            return
        job.reason = job.reason or explain(job.code)
        # A job that was asked to stop, was lost with its node, or found its task locked has not failed.
        if job.code in (None, EXIT_RESUME, EXIT_BUSY) and job.restarts < self.max_restarts:
            job.restarts += 1
            # Preemption and lost nodes are not failures of the job, so this
            # does not count as an attempt; `max_restarts` is the bound.
            job.attempts -= 1
            self._requeue(job)
        elif (
            # A user's error would fail in the same way, and a cancelled job must not be started; a crash may not recur.
            job.code not in (EXIT_USER_ERROR, EXIT_TASKS_FAILED, EXIT_BUSY, EXIT_INTERRUPTED)
            and job.attempts <= job.retries
        ):
            self._requeue(job)
        else:
            job.state = "failed"

    def _requeue(self, job: Job) -> None:
        job.state = "pending"
        self._queue.append(job)


def stopped(spec: JobSpec) -> bool:
    """Whether a file STOP exists for this job or its fan-out; no launcher restarts such a job."""
    return was_stopped(spec.run_dir, spec.table or spec.run_dir)


# --- exit codes ------------------------------------------------------------------------------------------------------


def explain(code: int | None) -> str:
    """The meaning of an exit code (None: no code is known)."""
    if code is None:
        return "lost: the process or its node is gone"
    if code < 0:
        return f"killed by signal {-code}"
    meanings = {
        EXIT_RESUME: "stopped early; the same command continues it",
        EXIT_BUSY: "another live process runs this task",
        EXIT_USER_ERROR: "refused (see its log)",
        EXIT_TASKS_FAILED: "some tasks failed",
        EXIT_INTERRUPTED: "cancelled",
    }
    return meanings.get(code, f"exit code {code}")


def joint_code(codes: Sequence[int]) -> int:
    """The exit code of a job of several processes: its first failure, else 75 if any process ended with it, else 0.

    Once a process has failed, a launcher ends the others by SIGTERM, and their exit codes are not counted as failures.
    """
    # If every process was ended by SIGTERM, there is no other code to report, and these count.
    counted = [code for code in codes if code != -signal.SIGTERM]
    if not any(counted):
        counted = list(codes)
    failures = [code for code in counted if code not in (0, EXIT_RESUME)]
    return failures[0] if failures else max(counted, default=0)
