"""Running a study's graph on any launcher: each run starts when its dependencies are done, with progress bars."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fine_dist.core.errors import TrainingError
from fine_dist.core.processes import stop_on_signals
from fine_dist.core.regular_files import last_row
from fine_dist.launchers.code_snapshot import code_root, snapshot
from fine_dist.launchers.launcher import Job, Launcher
from fine_dist.launchers.prepare import make_spec
from fine_dist.launchers.registry import get_launcher
from fine_dist.launchers.state_table import StateTable, Submissions
from fine_dist.launchers.worker import import_module, inside
from fine_dist.study import settings
from fine_dist.study.graph import Graph, StudyRun

LOG_LINES = 8
"""Number of lines of a failed run's log in the error message."""
REFRESH_S = 5.0
"""Seconds between two queries to a scheduler about jobs of an earlier call."""


def follow(graph: Graph, launcher: str = "auto", optional: Collection[str] = ()) -> dict[str, str]:
    """Run all runs that are not done. A failed run stops only the runs that depend on it.

    Args:
        graph: The runs.
        launcher: `local`, `slurm`, `ray`, `auto`, or `here` (this process, one after the other).
        optional: Names of runs that may fail, such as trials of tuning.

    Returns:
        The reasons of the optional runs that failed, by name.

    Raises:
        TrainingError: At the end, with the reason and the end of the log of each run that failed.
    """
    with RunBars(len(graph.runs)) as bars, stop_on_signals():
        if launcher == "here" or inside():
            return _follow_here(graph, bars, optional)

        with get_launcher(launcher, graph.study.launch) as runner:
            return _Queue(graph, runner, bars).run(optional)


def _follow_here(graph: Graph, bars: RunBars, optional: Collection[str]) -> dict[str, str]:
    failed: dict[str, str] = {}
    for run in _in_order(graph):
        if not run.done:
            bars.show(run)
            _prepare(graph, run)
            try:
                import_module(run.module).run(run.config)
            except TrainingError as error:
                if run.name not in optional:
                    raise
                failed[run.name] = str(error)
                bars.end(run, failed=True)
                continue
            run.stamp(done=True)
        bars.end(run)
    return failed


def _in_order(graph: Graph) -> list[StudyRun]:
    """All runs, each after its dependencies."""
    ordered: dict[str, StudyRun] = {}

    def visit(run: StudyRun) -> None:
        for name in run.after:
            visit(graph[name])
        ordered.setdefault(run.name, run)

    for run in graph.runs:
        visit(run)
    return list(ordered.values())


def _prepare(graph: Graph, run: StudyRun) -> None:
    if run.grows and not run.run_dir.exists():
        inherit(graph[run.grows], run)
    # The stamp of an older configuration is replaced before the run starts, so that it is gone even if the run fails.
    if not settings.finished(run.module, run.config):  # the stage itself refuses a result of another config
        run.stamp(done=False)


def inherit(short: StudyRun, run: StudyRun) -> None:
    """Copy the checkpoints and logs of a finished shorter run to a run directory, from which the engine resumes."""
    # Copied under a hidden name and renamed, so that an interrupted copy is not mistaken for a run directory.
    half = run.run_dir.with_name(f".{run.run_dir.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    shutil.copytree(short.run_dir / "checkpoints", half / "checkpoints")
    for path in (short.run_dir / "metrics.jsonl", *short.run_dir.glob("events.out.tfevents.*")):
        shutil.copy(path, half)
    half.rename(run.run_dir)


class _Queue:
    """The waiting and the running runs, and the outcome of the others."""

    def __init__(self, graph: Graph, runner: Launcher, bars: RunBars) -> None:
        self.graph, self.runner, self.bars = graph, runner, bars
        self.waiting = list(graph.runs)
        self.running: dict[str, Job] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self.submissions = Submissions(graph.study.root.absolute())
        self.table = StateTable(graph.study.root.absolute())
        self.elsewhere: set[str] = set()
        """Runs that an earlier call submitted and that the scheduler still has."""
        self._checked: set[str] = set()
        self._widths: dict[str, int] = {}
        self._next_refresh = 0.0
        self.code = self._code()

    def _code(self) -> str | None:
        """Path of the code of the jobs: a snapshot if they may start later. None: jobs run on this machine."""
        if self.runner.on_this_machine:
            return None
        module = self.graph.runs[0].module
        return str(snapshot(self.graph.study.root, module)) if self.graph.study.launch.snapshot else code_root(module)

    def run(self, optional: Collection[str]) -> dict[str, str]:
        while self.waiting or self.running:
            self._refresh_submissions()
            self._start_ready()
            self.runner.poll()
            for name, job in list(self.running.items()):
                self.bars.show(self.graph[name])
                if job.ended:
                    del self.running[name]
                    self._end(self.graph[name], job)
            if self.waiting or self.running:
                time.sleep(0.1)
        wanted = {name: why for name, why in self.failed.items() if name not in optional}
        if wanted:
            reasons = "\n".join(f"{name}: {why}" for name, why in wanted.items())
            raise TrainingError(f"{len(wanted)} of {len(self.graph.runs)} runs failed or could not start:\n{reasons}")
        return self.failed

    def _refresh_submissions(self) -> None:
        if self.runner.detached and time.monotonic() > self._next_refresh:
            self._next_refresh = time.monotonic() + REFRESH_S
            alive = self.runner.alive(self.submissions.all())
            # Otherwise a job of an interrupted earlier call would be submitted again, and two jobs would share a run
            # directory.
            self.elsewhere = {name for names in alive.values() for name in names} - self.running.keys()
            # Such a job may finish the run, so the stamp is read again when the job has left the scheduler.
            self._checked -= self.elsewhere

    def _start_ready(self) -> None:
        """Start the runs whose dependencies are done, in order; drop those that are done or can never start."""
        for run in list(self.waiting):
            failed = next((name for name in run.after if name in self.failed), None)
            if failed:
                self.waiting.remove(run)
                self.failed[run.name] = f"needs {failed}"
            elif not self.done.issuperset(run.after) or run.name in self.elsewhere:
                continue
            elif self._finished(run):
                self.waiting.remove(run)
                self._succeeded(run)
            elif len(self.running) < self._width(run):
                self.waiting.remove(run)
                self._submit(run)

    def _finished(self, run: StudyRun) -> bool:
        """Whether an earlier call has finished this run; the disk is read once for each run."""
        # The loop runs ten times a second, and a study on a network file system may have thousands of runs.
        if run.name in self._checked:
            return False
        self._checked.add(run.name)
        return run.done

    def _width(self, run: StudyRun) -> int:
        """Number of runs of this module that run at once."""
        most = self.graph.study.launch.max_parallel
        # Computed once for each module, because on a cluster it takes a query to the scheduler.
        if most is None and run.module not in self._widths:
            spec = make_spec(run.module, run.config, run.name, write=False)
            self._widths[run.module] = self.runner.fits(spec)
        return most or self._widths[run.module]

    def _submit(self, run: StudyRun) -> None:
        # Before the submission: a job may start and write its state before `submit` returns.
        self.table.add([run.name], {run.name: str(run.run_dir)})
        self.table.update(run.name, state="pending", reason=None)
        _prepare(self.graph, run)
        spec = make_spec(run.module, run.config, run.name, code=self.code, table=self.table.folder.parent)
        job = self.running[run.name] = self.runner.submit(spec, retries=self.graph.study.launch.retries)
        self.bars.show(run)
        if self.runner.detached:
            self.submissions.add({str(job.id): [run.name]})

    def _end(self, run: StudyRun, job: Job) -> None:
        if job.state == "done":
            run.stamp(done=True)
            self._succeeded(run)
            return
        log_end = "\n    ".join(self.runner.logs(job).splitlines()[-LOG_LINES:])
        self.failed[run.name] = f"{job.reason}; {job.log} ends with\n    {log_end}"
        self.bars.end(run, failed=True)

    def _succeeded(self, run: StudyRun) -> None:
        self.done.add(run.name)
        self.bars.end(run)


class RunBars:
    """One progress bar per running job, read from its metrics.jsonl: step, loss, rate and time left."""

    def __init__(self, count: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description:18}"), BarColumn(28), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.all = self.progress.add_task("all runs", total=count, facts="")
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> RunBars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, run: StudyRun) -> None:
        if run.name not in self._bars:
            self._bars[run.name] = self.progress.add_task(run.name, total=run.steps or None, facts="")
        row = newest(run)
        if row:
            facts = f"loss {row['loss']:.4f}  {row.get('steps_per_s', 0.0):.1f} step/s"
            self.progress.update(self._bars[run.name], completed=min(row["step"], run.steps), facts=facts)

    def end(self, run: StudyRun, failed: bool = False) -> None:
        fresh = run.name in self._bars
        if run.name in self._bars:
            self.progress.update(self._bars[run.name], visible=False)
        self.progress.advance(self.all)
        # a terminal shows the bars; a log gets one line for each run of this call
        if failed or (fresh and not self.progress.console.is_terminal):
            mark = "FAILED" if failed else f"-> {run.run_dir}"
            self.progress.console.print(f"  {run.name:18} {run.steps:5} steps  {mark}", highlight=False, soft_wrap=True)


def newest(run: StudyRun) -> dict[str, Any] | None:
    """The newest row with a training loss in the run's metrics.jsonl, or in those of its targets."""
    files = [run.run_dir / "metrics.jsonl", *run.run_dir.glob("*/metrics.jsonl")]
    rows = [row for file in files if (row := last_row(file, "loss"))]
    return max(rows, key=lambda row: row["step"], default=None)
