"""What all launchers share: a job's handle, the queue of a fan-out and retries.

A `LaunchTarget` is what `--launcher` names. Most targets are launchers, to which a command submits jobs; a
`CommandTarget` runs the command itself.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fine_dist.core.config import Config
from fine_dist.core.errors import EXIT_INTERRUPTED, EXIT_RESUME, EXIT_TASKS_FAILED, EXIT_USER_ERROR
from fine_dist.core.processes import stop_on_signals
from fine_dist.core.settings import LaunchConfig
from fine_dist.engine.run_dir import was_stopped
from launchers.prepare import job_file
from launchers.spec import Capacity, Finding, JobSpec
from launchers.worker import EXIT_BUSY

JobState = Literal["pending", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")


@dataclass(eq=False)
class Job:
    """Handle of one submitted job; the launcher that made it keeps it up to date."""

    spec: JobSpec
    file: Path
    """Its JSON on disk."""
    state: JobState = "pending"
    id: str | None = None
    """The scheduler's name of it."""
    code: int | None = None
    """Exit code once it has ended; negative: ended by that signal; None: it was lost."""
    reason: str | None = None
    """Why it failed, in the scheduler's words where there are any."""
    attempts: int = 0
    retries: int = 0
    """Further attempts it may have."""
    restarts: int = 0
    """Times it asked to be started again (exit code 75)."""
    show: bool = False
    """Its output goes to this terminal, where the launcher can, instead of its log."""
    handle: Any = field(default=None, repr=False)
    """The launcher's own."""
    own_log: Path | None = None
    """Where its output goes when the scheduler names the file."""

    @property
    def log(self) -> Path:
        """Its output."""
        return self.own_log or Path(self.spec.run_dir) / "logs" / f"{self.spec.name}.log"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED


class LaunchTarget(ABC):
    """What a name of `--launcher` means. Use as a context manager.

    needs: what the config's `launch` says; None: the defaults.
    """

    name: str
    """What `--launcher` calls it. Two may share a name: the first of the registry that `serves` is taken."""
    on_this_machine = False
    """Whether jobs get this machine's cores, memory and accelerators."""
    detached = False
    """Whether its jobs live on when this process ends."""

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        self.needs = needs or LaunchConfig()

    @classmethod
    def is_the_one(cls, needs: LaunchConfig) -> bool:
        """Whether `--launcher auto` means this one, by where this process is."""
        return False

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        """Whether it can be meant by its name, by where this process is and what is asked for."""
        return True

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        """What can be known of a job (one of `many` tasks) before it is started here."""
        return []

    def close(self) -> None:  # noqa: B027 (most hold nothing)
        """Free what it holds."""

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


P = TypeVar("P", bound=LaunchTarget)


class CommandTarget(LaunchTarget):
    """A place that takes a command as it is."""

    @abstractmethod
    def run(self, module: str, config: Config) -> int:
        """Run `module.run(config)` there, with all its tasks; the exit code."""


class Launcher(LaunchTarget):
    """Submits jobs and follows them. A subclass starts, checks and cancels one; the queue is here.

    Leaving it as a context manager cancels what it still runs.
    """

    max_restarts = 20
    copies_code = True
    """Whether jobs run a copy of the code, as `launch.snapshot` says, or the code where it lies."""

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        super().__init__(needs)
        self._queue: deque[Job] = deque()
        self._live: list[Job] = []
        self._width = 1

    # --- what users of a launcher call

    def runs_here(self, spec: JobSpec) -> bool:
        """Whether a single job such as this needs no process of its own: the command itself is the job."""
        return False

    def submit(self, spec: JobSpec, retries: int = 0, show: bool = False) -> Job:
        """Start one job now. show: its output goes to this terminal, where that can be."""
        job = self._job(spec, retries)
        job.show = show
        self._begin(job)
        return job

    def warm(self, spec: JobSpec) -> None:
        """Get ready for jobs like this one while the caller still checks what is to run."""
        return

    def submit_many(self, specs: Sequence[JobSpec], max_parallel: int | None = None, retries: int = 0) -> list[Job]:
        """Hand in many jobs, of which at most `max_parallel` run at once (None: as many as fit)."""
        jobs = [self._job(spec, retries) for spec in specs]
        self._queue.extend(jobs)
        self._width = max_parallel or (self.fits(specs[0]) if specs else 1)
        self.poll()
        return jobs

    def status(self, job: Job) -> JobState:
        """What became of a job."""
        if not job.ended:
            self.poll()
        return job.state

    def cancel(self, job: Job) -> None:
        """Stop a job; one that has ended is left alone."""
        if job in self._queue:
            self._queue.remove(job)
        if not job.ended:
            if job in self._live:
                self._live.remove(job)
                self._stop(job)
            job.state = "cancelled"

    def logs(self, job: Job) -> str:
        """What a job has printed so far."""
        return job.log.read_text(encoding="utf-8", errors="replace") if job.log.exists() else ""

    def wait(self, jobs: Sequence[Job], tick: Callable[[], None] | None = None, every_s: float = 0.02) -> list[Job]:
        """Stay until all jobs have ended; `tick` is called about every 0.5 s.

        An interrupt or SIGTERM has them save and end, unless they are the scheduler's (`detached`); after SIGTERM,
        SIGUSR1 or SIGUSR2 it raises `ResumeLater`.
        """
        last = 0.0
        try:
            with stop_on_signals():
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
                for job in self._live:
                    self._tell(job)  # all of them first, so that they save at the same time
                for job in jobs:
                    self.cancel(job)
            raise

    def poll(self) -> None:
        """Look after running jobs, try again what may be tried again, start what waits."""
        for job in list(self._live):
            if self._check(job):
                self._live.remove(job)
                self._ended(job)
        while self._queue and len(self._live) < self._width:
            job = self._queue.popleft()
            if job.spec.table and was_stopped(job.spec.table):
                job.state, job.code, job.reason = "cancelled", EXIT_RESUME, STOPPED_WORDS
            else:
                self._begin(job)

    def alive(self, submissions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Those of earlier submissions that still wait or run."""
        return {}

    def close(self) -> None:
        """Cancel what still runs and free what the launcher holds."""
        for job in [*self._queue, *self._live]:
            self.cancel(job)

    def capacity(self, spec: JobSpec, many: bool = True) -> Capacity:
        """The machines that `many` such jobs get, or one job alone: what a fan-out is planned for, and checked with.

        Its own machines, not the one that this process is on.
        """
        memory = self.needs.gpu_memory_gb
        return Capacity(
            workers=self.fits(spec) if many else 1,
            accelerator_bytes=memory * 2**30 if memory and spec.accelerators_per_node else None,
            cpu=not spec.accelerators_per_node,
            host_bytes=spec.memory_gb * 2**30 if spec.memory_gb else None,
        )

    # --- what a launcher must say

    @abstractmethod
    def fits(self, spec: JobSpec) -> int:
        """How many such jobs its machines hold at once."""

    @abstractmethod
    def _start(self, job: Job) -> None:
        """Start it; set `handle` and `id`."""

    @abstractmethod
    def _check(self, job: Job) -> bool:
        """Whether it has ended; then `code` (and `reason`) are set."""

    @abstractmethod
    def _stop(self, job: Job) -> None:
        """End it."""

    def _tell(self, job: Job) -> None:
        """Ask it to save and end, without waiting."""

    # --- the queue

    def _job(self, spec: JobSpec, retries: int) -> Job:
        file = job_file(spec)  # its name is a hash of what it holds
        if not file.is_file():
            spec.save(file)
        return Job(spec, file, retries=retries)

    def _begin(self, job: Job) -> None:
        job.attempts += 1
        job.state, job.code, job.reason = "running", None, None
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self._start(job)
        self._live.append(job)

    def _ended(self, job: Job) -> None:
        if job.code == 0:
            job.state = "done"
            return
        if job.code == EXIT_RESUME and stopped(job.spec):
            job.state, job.reason = "cancelled", STOPPED_WORDS
            return
        job.reason = job.reason or explain(job.code)
        # Told to stop, lost with its node, or another process is about to let go of the task: no failure of the task.
        if job.code in (None, EXIT_RESUME, EXIT_BUSY) and job.restarts < self.max_restarts:
            job.restarts += 1
            job.attempts -= 1
            self._again(job)
        elif (
            job.code not in (EXIT_USER_ERROR, EXIT_TASKS_FAILED, EXIT_BUSY, EXIT_INTERRUPTED)
            and job.attempts <= job.retries
        ):
            self._again(job)
        else:
            job.state = "failed"

    def _again(self, job: Job) -> None:
        job.state = "pending"
        self._queue.append(job)


STOPPED_WORDS = "stopped by a file STOP; the same command continues it"


def stopped(spec: JobSpec) -> bool:
    """Whether somebody left a file STOP for this job or its fan-out: it is then not started again by itself."""
    return was_stopped(spec.run_dir, spec.table or spec.run_dir)


def explain(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "lost: the process or its node is gone"
    if code < 0:
        return f"killed by signal {-code}"
    words = {
        EXIT_RESUME: "stopped early; the same command continues it",
        EXIT_BUSY: "another live process runs this task",
        EXIT_USER_ERROR: "refused (see its log)",
        EXIT_TASKS_FAILED: "some tasks failed",
        EXIT_INTERRUPTED: "cancelled",
    }
    return words.get(code, f"exit code {code}")


def joint_code(codes: Sequence[int]) -> int:
    """The exit code of a job of several processes: its first real failure, else 75 if any said so, else 0.

    A process that was ended by SIGTERM, after another had ended with a code of its own, says nothing.
    """
    said = [code for code in codes if code != -signal.SIGTERM]
    if not any(said):
        said = list(codes)
    real = [code for code in said if code not in (0, EXIT_RESUME)]
    return real[0] if real else max(said, default=0)
