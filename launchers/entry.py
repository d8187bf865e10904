"""`launch`: the function with which every command runs its stage, here, in a local pool, on SLURM or on Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from fine_dist.core.arguments import Call, parse
from fine_dist.core.config import Config, dump_yaml, run_dir_of
from fine_dist.core.errors import EXIT_TASKS_FAILED, LaunchError, ResumeLater, guard
from fine_dist.engine.run_dir import STOP, STOPPED, resumption_note, was_stopped
from fine_dist.launchers.code_snapshot import code_root, snapshot
from fine_dist.launchers.launch_target import CommandTarget
from fine_dist.launchers.launcher import Job, Launcher
from fine_dist.launchers.local import Here, run_here
from fine_dist.launchers.machine import require_accelerators
from fine_dist.launchers.preflight import LOCAL_SUBJECTS, beyond_this_machine, check_job, refuse
from fine_dist.launchers.prepare import fans_out, is_done, launch_of, make_spec, make_specs, result_lines, tasks_of
from fine_dist.launchers.registry import pick
from fine_dist.launchers.spec import JobSpec, Task
from fine_dist.launchers.state_table import StateTable, Submissions, TaskRow
from fine_dist.launchers.worker import EXIT_BUSY, JOB_ENV, inside, world_size

log = logging.getLogger(__name__)


def launch(module: str, config: Config, launcher: str = "auto") -> int:
    """Run `module.run(config)` with a launcher.

    A module with `tasks(config)` or `tasks(config, capacity)` that returns a list of `Task` is a fan-out: each task is
    `run(task.config)`, recorded in the state table of `config.run_dir`, and a task that is complete is not run again.
    If that function returns None or does not exist, the module is one job. `capacity` describes the machines that the
    tasks will run on.

    Args:
        module: Importable name of a module with `run(config)`, whose first parameter is annotated with a config class.
        config: Has `run_dir`, and `launch: LaunchConfig` for the resources of the job.
        launcher: A value of `--launcher`. Inside a job everything runs in this process.

    Returns:
        The exit code: 0 done (or submitted), 3 some tasks failed, 75 stopped early and to be started again, else the
        exit code of the job.

    Raises:
        LaunchError: The job cannot run there; the message says why, with the remedy.
    """
    needs = launch_of(config)
    if inside():
        _refuse_single_rank(make_spec(module, config, write=False))
    # A command inside a job must not submit jobs. Otherwise a task of an array would start a fan-out.
    target = Here if inside() else pick(launcher, needs)
    if not inside() and target.on_this_machine and needs.preflight != "off":
        beyond = beyond_this_machine(config, make_spec(module, config, write=False))
        _refuse_beyond(beyond, needs.preflight == "refuse", log.warning)
    with target(needs) as runner:
        if isinstance(runner, CommandTarget):
            code = runner.run(module, config)
        else:
            assert isinstance(runner, Launcher)
            code = _on_launcher(runner, module, config)
    if code == 0 and not inside() and not (target.detached and not needs.wait):
        for line in result_lines(module, config):
            print(line, flush=True)
    return code


def _on_launcher(runner: Launcher, module: str, config: Config) -> int:
    spec = make_spec(module, config, code=code_root(module), write=False)
    tasks = None
    if fans_out(module):
        runner.warm(spec)
        tasks = tasks_of(module, config, runner.capacity(spec))
    if tasks is not None:
        return _fan_out(runner, module, config, tasks)
    if runner.runs_here(spec):
        require_accelerators(spec)
        return run_here(module, config)
    return _single(runner, module, config)


def _refuse_beyond(beyond: str, refuse: bool, note: Callable[[str], None]) -> None:
    """Raise the sentence of `beyond_this_machine`, if there is one, as an error, or pass it to `note`."""
    if beyond and refuse:
        raise LaunchError(f"{beyond} (--launch.preflight off starts it anyway)")
    if beyond:
        note(beyond)


def _refuse_single_rank(spec: JobSpec) -> None:
    """Refuse to run one rank of a job that asks for several.

    The shell of `srun --pty bash` has the environment variables of a step with one task, so that a command typed there
    looks like a rank, and would train with one process.

    Raises:
        LaunchError: This process is the only one of its step, and the config asks for more.
    """
    if JOB_ENV not in os.environ and world_size() == 1 and spec.world_size > 1:
        raise LaunchError(
            f"launch asks for {spec.world_size} processes, and this process is the only one that torchrun or srun "
            "started (the shell of `srun --pty` is such a process); use `salloc` and --launcher slurm, start "
            f"{spec.world_size} processes with srun or torchrun, or set --launch.processes 1 --launch.nodes 1"
        )


def run_command(
    module: str,
    kind: type[Config],
    argv: list[str] | None,
    dry_run: Callable[[Call], list[str]],
    promise: str | None = None,
    notes: Callable[[], list[str]] | None = None,
) -> int:
    """Run a command that has no flags of its own: parse, then print the dry run or launch. Returns the exit code.

    Args:
        module: Importable name of the command's module.
        kind: Class of its settings.
        argv: Command line. None: that of the process.
        dry_run: Returns the lines that `--dry-run` prints.
        promise: Text for a user who interrupts the command. None: `promise_of` the run directory.
        notes: Further lines of the help.
    """
    run_dir: Path | None = None

    def body() -> int:
        nonlocal run_dir
        call = parse(kind, argv, f"fine-dist {module.rpartition('.')[2]}", notes=notes)
        if call.dry_run:
            print("\n".join(dry_run(call)))
            return 0
        run_dir = run_dir_of(call.config)
        return launch(module, call.config, call.launcher)

    return guard(body, lambda: promise if promise is not None else resumption_note(run_dir) if run_dir else "")


def plain_dry_run(call: Call) -> list[str]:
    """The dry run of commands without estimates: the resolved config."""
    return [dump_yaml(call.config), "dry run: nothing was done"]


# --- one job ---------------------------------------------------------------------------------------------------------


def _single(runner: Launcher, module: str, config: Config) -> int:
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    _refuse_second(runner, run_dir)
    _preflight(runner, module, config, many=False)
    job = runner.submit(make_spec(module, config, code=_code(runner, module, config)), show=True)
    if runner.detached:
        Submissions(run_dir).add({str(job.id): [job.spec.name]})
        print(f"submitted {job.spec.name} as {runner.name} job {job.id}; log: {job.log}", flush=True)
        if not needs.wait:
            print(f"follow: python -m fine_dist.status {run_dir}", flush=True)
            return 0
    runner.wait([job])
    if job.code:
        log.error("%s: %s; log: %s", job.spec.name, job.reason, job.log)
    return 1 if job.code is None or job.code < 0 else job.code


def _refuse_second(runner: Launcher, run_dir: Path) -> None:
    alive = runner.alive(Submissions(run_dir).all())
    if alive:
        raise LaunchError(f"{run_dir}: {runner.name} job {next(iter(alive))} works on it already; cancel it or wait")


# --- a fan-out -------------------------------------------------------------------------------------------------------


def _fan_out(runner: Launcher, module: str, config: Config, tasks: list[Task]) -> int:
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    table = StateTable(run_dir)
    # Two drivers of one run directory would submit every task twice.
    with table.driver(f"{runner.name} fan-out"):
        if tasks:
            _preflight(runner, module, tasks[0].config, many=True)
        for name in (STOP, STOPPED):  # files of an earlier run; a new start cancels the request to stop
            (run_dir / name).unlink(missing_ok=True)
        specs = make_specs(module, config, tasks, code=_code(runner, module, config))
        # Queued tasks of a scheduler are `pending` in the table;
        # without this they would be submitted a second time.
        queued = {name for names in runner.alive(Submissions(run_dir).all()).values() for name in names}
        remaining = [spec for spec in specs if not is_done(table, spec) and queued.isdisjoint(spec.rows)]
        print(f"{module}: {_counts(table, specs, queued)}", flush=True)
        if runner.detached:
            jobs = runner.submit_many(remaining, needs.max_parallel, needs.retries) if remaining else []
            # Recorded after the submission, because the scheduler chooses the ids.
            Submissions(run_dir).add({str(job.id): job.spec.rows for job in jobs})
            if jobs:
                print(f"submitted as {runner.name} jobs {jobs[0].id} to {jobs[-1].id}; "
                      f"follow: fine-dist status {run_dir}", flush=True)  # fmt: skip
            if not needs.wait:
                return 0
            follow(runner, table, jobs)
        elif remaining:
            follow(runner, table, runner.submit_many(remaining, needs.max_parallel, needs.retries))
    code = report(table, specs)
    if code and was_stopped(run_dir):
        raise ResumeLater(f"a file STOP was in {run_dir}; the same command continues")
    return code


def _counts(table: StateTable, specs: list[JobSpec], queued: set[str]) -> str:
    """`8 tasks in 2 jobs, 3 done before, 5 to run`: rows of the state table, which `status` counts as well."""
    names = [name for spec in specs for name in spec.rows]
    done = sum((row := table.get(name)) is not None and row.state == "done" for name in names)
    running = sum(name in queued for name in names)
    waiting = f", {running} in the queue already" if queued else ""
    jobs = f" in {len(specs)} jobs" if len(specs) < len(names) else ""
    return f"{len(names)} tasks{jobs}, {done} done before{waiting}, {len(names) - done - running} to run"


def follow(runner: Launcher, table: StateTable, jobs: list[Job]) -> None:
    """Wait for the jobs of a fan-out, and record failures that the jobs' processes could not record themselves."""
    for job in runner.wait(jobs):
        # EXIT_BUSY is not a failure: the process that holds the task records its end.
        if job.code in (0, EXIT_BUSY) or job.state == "cancelled":
            continue
        for name in job.spec.rows:
            row = table.get(name) or TaskRow(name=name)
            # A process records its own end unless it never started (row still pending)
            # or was killed (row lost); only these rows are ended here.
            if row.state == "pending" or table.lost(row):
                table.finish(name, "failed", job.reason)


def report(table: StateTable, specs: list[JobSpec]) -> int:
    """Print how many tasks of a fan-out are done and name those that failed; returns the exit code."""
    names = {name for spec in specs for name in spec.rows}
    rows = [row for row in table.rows() if row.name in names]
    failed = [row for row in rows if row.state == "failed"]
    print(f"{sum(row.state == 'done' for row in rows)} of {len(rows)} tasks done, {len(failed)} failed", flush=True)
    for row in failed[:20]:
        log.error("%s: %s (attempts: %d)", row.name, row.reason, row.attempts)
    return 0 if all(row.state == "done" for row in rows) else EXIT_TASKS_FAILED


def _preflight(runner: Launcher, module: str, config: Config, many: bool) -> None:
    needs, spec = launch_of(config), make_spec(module, config, write=False)
    if runner.on_this_machine:
        require_accelerators(spec)  # also with launch.preflight off; `plan` only prints a note
    if needs.preflight != "off":
        refuse(needs, check_job(module, config, spec, runner, many=many, light=many))


def _code(runner: Launcher, module: str, config: Config) -> str:
    # The local pool runs the installed code, because no time passes between its submissions and starts.
    copies = launch_of(config).snapshot and runner.copies_code
    return str(snapshot(run_dir_of(config), module)) if copies else code_root(module)


# --- a dry run -------------------------------------------------------------------------------------------------------


def check(module: str, config: Config, launcher: str = "auto") -> None:
    """Check a command without starting anything, for a dry run.

    It refuses what the run would refuse, except for findings about this machine alone (accelerators, data, disk), which
    are printed as notes: a dry run is often made on a laptop or a login node. No cluster is asked.

    Raises:
        LaunchError: The run would be refused, or there is no such launcher.
    """
    needs = launch_of(config)
    target = pick(launcher, needs)
    local = target.on_this_machine and not inside()
    with target(needs) if local else Here(needs) as runner:
        spec = make_spec(module, config, write=False)
        findings = check_job(module, config, spec, runner if local else None, light=True)
        beyond = beyond_this_machine(config, spec) if local else ""
    # With `auto`, the job of the dry run may be meant for a larger machine.
    _refuse_beyond(beyond, launcher != "auto" and needs.preflight == "refuse", lambda text: print(f"note: {text}\n"))
    refuse(needs, [finding for finding in findings if finding.what not in LOCAL_SUBJECTS])
    for finding in findings:
        if finding.what in LOCAL_SUBJECTS and finding.level != "ok":
            print(f"note: {finding.text}\n")
