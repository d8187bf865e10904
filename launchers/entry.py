"""`launch`: the one function every command calls to run its stage here, locally, on SLURM or on Ray."""

from __future__ import annotations

import logging
from pathlib import Path

from fine_dist.core.config import Config, run_dir_of
from fine_dist.core.errors import EXIT_TASKS_FAILED, LaunchError, ResumeLater
from fine_dist.engine.run_dir import STOP, STOPPED, was_stopped
from launchers.base import CommandTarget, Job, Launcher
from launchers.code_snapshot import code_root, snapshot
from launchers.here import Here, check_accelerators, run_here
from launchers.preflight import preflight, refuse
from launchers.prepare import fans_out, launch_of, make_spec, make_specs, tasks_of
from launchers.registry import pick
from launchers.spec import JobSpec, Task
from launchers.state_table import StateTable, Submissions, TaskRow
from launchers.worker import EXIT_BUSY, inside

log = logging.getLogger(__name__)


def launch(module: str, config: Config, launcher: str = "auto") -> int:
    """Run `module.run(config)` where `launcher` says; the exit code.

    module:   importable name with `run(config)`; the first parameter of `run` is annotated with the config class.
              A module with `tasks(config)` or `tasks(config, capacity)`, which returns a list of `Task` or None, is a
              fan-out: each task is `run(task.config)`, recorded in the state table of `config.run_dir`; a task that
              is done is not run again. None: one ordinary job. The `Capacity` describes the machines that tasks will
              run on.
    config:   has `run_dir`, and `launch: LaunchConfig` for what the job needs.
    launcher: a name of `launchers.registry`, or `auto`. Inside a job it is always `here`.

    Codes: 0 done (or submitted), 3 some tasks failed, 75 stopped early and to be started again, else what the job ended
    with. Raises `LaunchError` when it cannot run there, with the remedy.
    """
    needs = launch_of(config)
    place = Here if inside() else pick(launcher, needs)
    with place(needs) as runner:
        if isinstance(runner, CommandTarget):
            return runner.run(module, config)
        assert isinstance(runner, Launcher)
        spec = make_spec(module, config, code=code_root(module), write=False)
        tasks = None
        if fans_out(module):
            runner.warm(spec)
            tasks = tasks_of(module, config, runner.capacity(spec))
        if tasks is not None:
            return _fan_out(runner, module, config, tasks)
        if runner.runs_here(spec):
            check_accelerators(spec)
            return run_here(module, config)
        return _one(runner, module, config)


def check(module: str, config: Config, launcher: str = "auto") -> None:
    """What a dry run can know of where a command would run: `LaunchError` for a launcher that does not exist, or for
    accelerators that this machine has not when the job would run on it. Nothing is started, no cluster is asked."""
    place = pick(launcher, launch_of(config))
    if place.on_this_machine and not inside():
        check_accelerators(make_spec(module, config, write=False))


def _one(runner: Launcher, module: str, config: Config) -> int:
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    _refuse_second(runner, run_dir)
    _preflight(runner, module, config, many=False)
    job = runner.submit(make_spec(module, config, code=_code(runner, module, config)), show=True)
    if runner.detached:
        Submissions(run_dir).add({str(job.id): [job.spec.name]})
        print(f"submitted {job.spec.name} as {runner.name} job {job.id}; log: {job.log}", flush=True)
        if not needs.wait:
            return 0
    runner.wait([job])
    if job.code:
        log.error("%s: %s; log: %s", job.spec.name, job.reason, job.log)
    return 1 if job.code is None or job.code < 0 else job.code


def _fan_out(runner: Launcher, module: str, config: Config, tasks: list[Task]) -> int:
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    table = StateTable(run_dir)
    with table.driver(f"{runner.name} fan-out"):
        for word in (STOP, STOPPED):  # left from before: the user starts it again, so it does not count
            (run_dir / word).unlink(missing_ok=True)
        if tasks:
            _preflight(runner, module, tasks[0].config, many=True)
        specs = make_specs(module, config, tasks, code=_code(runner, module, config))
        queued = runner.alive(Submissions(run_dir).all())
        taken = {name for names in queued.values() for name in names}
        over = {row.name for row in table.rows() if row.state == "done"}
        todo = [spec for spec in specs if not over.issuperset(spec.rows) and taken.isdisjoint(spec.rows)]
        done = sum(over.issuperset(spec.rows) for spec in specs)
        waiting = f", {len(specs) - done - len(todo)} in the queue already" if taken else ""
        print(f"{module}: {len(specs)} tasks, {done} done before{waiting}, {len(todo)} to run", flush=True)
        if runner.detached:
            jobs = runner.submit_many(todo, needs.max_parallel, needs.retries) if todo else []
            Submissions(run_dir).add({str(job.id): job.spec.rows for job in jobs})
            if jobs:
                print(f"submitted as {runner.name} jobs {jobs[0].id} to {jobs[-1].id}; "
                      f"follow: python -m fine_dist.status {run_dir}", flush=True)  # fmt: skip
            if not needs.wait:
                return 0
            follow(runner, table, jobs)
        elif todo:
            follow(runner, table, runner.submit_many(todo, needs.max_parallel, needs.retries))
    code = report(table, specs)
    if code and was_stopped(run_dir):
        raise ResumeLater(f"a file STOP was in {run_dir}; the same command continues")
    return code


def _preflight(runner: Launcher, module: str, config: Config, many: bool) -> None:
    needs = launch_of(config)
    if needs.preflight != "off":
        spec = make_spec(module, config, write=False)
        found = preflight(module, config, spec, light=many, capacity=runner.capacity(spec, many))
        refuse(needs, [*found, *runner.findings(spec, many)])


def _refuse_second(runner: Launcher, run_dir: Path) -> None:
    alive = runner.alive(Submissions(run_dir).all())
    if alive:
        raise LaunchError(f"{run_dir}: {runner.name} job {next(iter(alive))} works on it already; cancel it or wait")


def follow(runner: Launcher, table: StateTable, jobs: list[Job]) -> None:
    """Stay with the jobs of a fan-out to their ends, and write down those that died without a word of their own."""
    for job in runner.wait(jobs):
        if job.code in (0, EXIT_BUSY) or job.state == "cancelled":
            continue
        for name in job.spec.rows:
            row = table.get(name) or TaskRow(name=name)
            if row.state == "pending" or table.lost(row):
                table.finish(name, "failed", job.reason)


def report(table: StateTable, specs: list[JobSpec]) -> int:
    """Say what became of a fan-out; its exit code."""
    wanted = {name for spec in specs for name in spec.rows}
    rows = [row for row in table.rows() if row.name in wanted]
    failed = [row for row in rows if row.state == "failed"]
    print(f"{sum(row.state == 'done' for row in rows)} of {len(rows)} tasks done, {len(failed)} failed", flush=True)
    for row in failed[:20]:
        log.error("%s: %s (attempts: %d)", row.name, row.reason, row.attempts)
    return 0 if all(row.state == "done" for row in rows) else EXIT_TASKS_FAILED


def _code(runner: Launcher, module: str, config: Config) -> str:
    wanted = launch_of(config).snapshot and runner.copies_code
    return str(snapshot(run_dir_of(config), module)) if wanted else code_root(module)
