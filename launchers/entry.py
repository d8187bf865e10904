"""`launch`: the one function every command calls to run its stage here, locally, on SLURM or on Ray."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from fine_dist.config import Config, LaunchConfig
from fine_dist.errors import EXIT_TASKS_FAILED, LaunchError
from fine_dist.jobs import JobSpec, Row, StateTable, Submissions, Task
from fine_dist.submit import code_root, is_done, launch_of, make_spec, make_specs, run_dir_of, snapshot, tasks_of
from fine_dist.worker import EXIT_BUSY, import_module, inside
from launchers.base import Job, Launcher, choose, get_launcher


def launch(module: str, config: Config, launcher: str = "auto") -> int:
    """Run `module.run(config)` where `launcher` says; the exit code.

    module:   importable name with `run(config)`; the first parameter of `run` is annotated with the config class.
              With `tasks(config) -> list[jobs.Task] | None` it is a fan-out: each task is `run(task.config)`, kept in
              the state table of `config.run_dir`; a task that is done is not run again. None: one ordinary job.
    config:   has `run_dir`, and `launch: LaunchConfig` for what the job needs.
    launcher: `here` (this process), `local`, `slurm`, `ray`, or `auto`. Inside a job it is always `here`.

    Codes: 0 done (or submitted), 3 some tasks failed, 75 stopped early and to be started again, else what the job ended
    with. Raises `LaunchError` when it cannot run there, with the remedy.
    """
    if launcher == "here" or inside():
        return _here(module, config)
    kind = choose(launcher)
    address = launch_of(config).address or os.environ.get("RAY_ADDRESS") or ""
    if kind == "ray" and address.startswith("http"):
        from launchers.ray_jobs import submit_command

        return submit_command(module, config, address)
    needs = launch_of(config)
    with contextlib.ExitStack() as stack:
        runner: Launcher | None = None
        if kind == "local" and hasattr(import_module(module), "tasks"):
            runner = stack.enter_context(get_launcher(kind))
            runner.warm(make_spec(module, config, code=code_root(module), write=False))
        tasks = tasks_of(module, config)
        if kind == "local" and tasks is None and needs.nodes == needs.processes == 1:
            return _here(module, config)
        if tasks is None:
            return _one(kind, module, config)
        runner = runner or stack.enter_context(get_launcher(kind, **_settings(kind, needs)))
        return _fan_out(runner, kind, module, config, tasks)


def _here(module: str, config: Config) -> int:
    result = import_module(module).run(config)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _one(kind: str, module: str, config: Config) -> int:
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    with get_launcher(kind, **_settings(kind, needs, show=True)) as runner:
        _refuse_second(runner, run_dir)
        _preflight(runner, module, config, many=False)
        job = runner.submit(make_spec(module, config, code=_code(kind, module, config)))
        if runner.detached:
            Submissions(run_dir).add({str(job.id): [job.spec.name]})
            print(f"submitted {job.spec.name} as {runner.name} job {job.id}; log: {job.log}", flush=True)
            if not needs.wait:
                return 0
        runner.wait([job])
        if job.code:
            print(f"{job.spec.name}: {job.reason}; log: {job.log}", file=sys.stderr)
        return 1 if job.code is None or job.code < 0 else job.code


def _fan_out(runner: Launcher, kind: str, module: str, config: Config, tasks: list[Task]) -> int:
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    table = StateTable(run_dir)
    with table.driver(f"{kind} fan-out"):
        if tasks:
            _preflight(runner, module, tasks[0].config, many=True)
        specs = make_specs(module, config, tasks, code=_code(kind, module, config))
        queued = runner.alive(Submissions(run_dir).all())
        taken = {name for names in queued.values() for name in names}
        todo = [spec for spec in specs if not is_done(table, spec) and not taken.intersection(spec.rows)]
        done = sum(is_done(table, spec) for spec in specs)
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
    return report(table, specs)


def _preflight(runner: Launcher, module: str, config: Config, many: bool) -> None:
    from fine_dist.plan import preflight, refuse

    needs = launch_of(config)
    if needs.preflight != "off":
        spec = make_spec(module, config, write=False)
        found = preflight(module, config, spec, light=many, here=runner.name == "local")
        refuse(needs, [*found, *runner.findings(spec, many)])


def _refuse_second(runner: Launcher, run_dir: Path) -> None:
    alive = runner.alive(Submissions(run_dir).all())
    if alive:
        raise LaunchError(f"{run_dir}: {runner.name} job {next(iter(alive))} works on it already; cancel it or wait")


def follow(runner: Launcher, table: StateTable, jobs: list[Job]) -> None:
    """Stay with the jobs of a fan-out to their ends, and write down those that died without a word of their own."""
    for job in runner.wait(jobs):
        if job.code in (0, EXIT_BUSY):
            continue
        for name in job.spec.rows:
            row = table.get(name) or Row(name=name)
            if row.state == "pending" or table.lost(row):
                table.finish(name, "failed", job.reason)


def report(table: StateTable, specs: list[JobSpec]) -> int:
    """Say what became of a fan-out; its exit code."""
    wanted = {name for spec in specs for name in spec.rows}
    rows = [row for row in table.rows() if row.name in wanted]
    failed = [row for row in rows if row.state == "failed"]
    print(f"{sum(row.state == 'done' for row in rows)} of {len(rows)} tasks done, {len(failed)} failed", flush=True)
    for row in failed[:20]:
        print(f"  {row.name}: {row.reason} (attempts: {row.attempts})", file=sys.stderr)
    return 0 if all(row.state == "done" for row in rows) else EXIT_TASKS_FAILED


def _code(kind: str, module: str, config: Config) -> str:
    wanted = launch_of(config).snapshot and kind != "local"
    return str(snapshot(run_dir_of(config), module)) if wanted else code_root(module)


def _settings(kind: str, needs: LaunchConfig, show: bool = False) -> dict[str, Any]:
    if kind == "local":
        return {"show": show}
    return {"needs": needs}
