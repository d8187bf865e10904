"""From a config to job files: the resolved config and one `JobSpec` for each task, on disk, and their table rows."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fine_dist.core.config import Config, DumpCache, dump_yaml, run_dir_of
from fine_dist.core.errors import LaunchError
from fine_dist.core.files import sha256_text, sync_disk, write_atomic
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.spec import Capacity, JobSpec, Task
from fine_dist.launchers.state_table import StateTable
from fine_dist.launchers.worker import import_module


def launch_of(config: Config) -> LaunchConfig:
    """The launch settings of a stage's config; the defaults if it has none."""
    launch = getattr(config, "launch", None)
    return launch if isinstance(launch, LaunchConfig) else LaunchConfig()


def fans_out(module: str) -> bool:
    """Whether a module may be many tasks, because it has `tasks(config)` or `tasks(config, capacity)`."""
    return callable(getattr(import_module(module), "tasks", None))


def tasks_of(module: str, config: Config, capacity: Capacity | None = None) -> list[Task] | None:
    """The tasks of a fan-out.

    Args:
        module: Name of the module.
        config: Its config.
        capacity: Capacity of the machines of the tasks; passed on if the module's `tasks` takes it.

    Returns:
        The tasks, or None if the module is one job for this config.

    Raises:
        LaunchError: Two tasks share a name.
    """
    if not fans_out(module):
        return None
    make: Callable[..., list[Task] | None] = import_module(module).tasks
    # The second parameter is optional, because most modules need not know the machines.
    takes_capacity = len(inspect.signature(make).parameters) > 1
    tasks = make(config, capacity) if takes_capacity else make(config)
    if tasks is None:
        return None
    names = [row for task in tasks for row in _rows(task)]
    if len(set(names)) < len(names):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise LaunchError(f"{module}: two tasks are named {duplicates[0]!r}")
    return tasks


def _rows(task: Task) -> tuple[str, ...]:
    return task.rows or (task.name,)


def result_lines(module: str, config: Config) -> list[str]:
    """The last lines of a successful command, from its module: its result and the next command."""
    lines: Callable[[Config], list[str]] | None = getattr(import_module(module), "result_lines", None)
    return lines(config) if lines else []


def make_spec(
    module: str, config: Config, name: str | None = None, *, code: str | None = None, table: Path | None = None,
    rows: Sequence[str] = (), write: bool = True, durable: bool = True, cache: DumpCache | None = None,
) -> JobSpec:  # fmt: skip
    """The job of one config.

    Names of the files it writes carry a hash of their content, so that a second submission never changes the files of
    the first.

    Args:
        module: Importable name of a module with `run(config)`.
        config: Its config, whose resolved YAML is written into the run directory.
        name: Name of the job. None: the last part of the module's name.
        code: Folder with a copy of the code. None: the installed code.
        table: Run directory of the fan-out that the job is a task of.
        rows: Rows of its state table; empty: one row, `name`.
        write: Whether to write the config; a plan writes nothing.
        durable: Whether to sync the file; a caller that writes many files syncs them together.
        cache: Cache of `dump_yaml` that the tasks of a fan-out share.
    """
    launch = launch_of(config)
    run_dir = run_dir_of(config)
    _check_path(run_dir)
    name = name or module.rpartition(".")[2]
    text = dump_yaml(config, cache)
    path = (table or run_dir) / "jobs" / f"{name}-{short_hash(text)}.yaml"
    if write:
        write_atomic(path, text, durable=durable)
    return JobSpec(
        name=name,
        module=module,
        config=str(path),
        run_dir=str(run_dir),
        cwd=os.getcwd(),
        code=code,
        table=str(table) if table else None,
        tasks=tuple(rows),
        nodes=launch.nodes,
        processes_per_node=launch.processes,
        accelerators_per_node=launch.gpus * launch.processes,
        cpus_per_process=launch.cpus,
        memory_gb=launch.memory_gb,
        minutes=launch.minutes,
        env=launch.env,
        extras={"slurm": dict(launch.slurm), "ray": dict(launch.ray)},
    )


def _check_path(run_dir: Path) -> None:
    """Refuse a run directory that a job script, which is lines of text, cannot contain.

    Raises:
        LaunchError: The path holds a newline or another control character.
    """
    control = [char for char in str(run_dir) if ord(char) < 32 or ord(char) == 127]
    if control:
        raise LaunchError(f"run_dir {str(run_dir)!r} holds the control character {control[0]!r}; choose another name")


def make_specs(module: str, config: Config, tasks: Sequence[Task], *, code: str | None = None) -> list[JobSpec]:
    """The jobs of a fan-out, with configs and job files on disk and rows in the state table.

    Rows that are `done` become `pending` if the module reports that their results are not complete for this config.

    Args:
        module: Importable name of the module.
        config: Config of the fan-out; its `launch` settings apply to every task.
        tasks: The tasks.
        code: Folder with a copy of the code. None: the installed code.
    """
    home = run_dir_of(config)
    launch = launch_of(config)
    specs = []
    run_dirs: dict[str, str] = {}
    cache: DumpCache = {}
    for task in tasks:
        part = task.config
        if "launch" in type(part).model_fields:
            # Every task gets the resources that the command line or the file states for the fan-out.
            part = part.model_copy(update={"launch": launch})
        spec = make_spec(module, part, task.name, code=code, table=home, rows=task.rows, durable=False, cache=cache)
        spec.save(job_file(spec), durable=False)
        run_dirs |= dict.fromkeys(spec.rows, spec.run_dir)
        specs.append(spec)
    if specs:
        sync_disk(home)  # one sync for all files
    # Rows are added only after the job files are durable.
    table = StateTable(home)
    table.add([row for spec in specs for row in spec.rows], run_dirs)
    reconcile(table, tasks)
    return specs


def reconcile(table: StateTable, tasks: Sequence[Task]) -> None:
    """Update the state table from the results on disk, for modules that report which are complete (`Task.complete`).

    A done task whose config now has more steps becomes pending, and a pending task whose results are complete, because
    another launcher or a single command has trained it, becomes done.
    """
    for task in tasks:
        if task.complete is not None:
            complete = set(task.complete)
            table.reopen(name for name in _rows(task) if name not in complete)
            # Only pending rows: the process of a running task records its end itself.
            finished = [name for name in complete if (row := table.get(name)) is not None and row.state == "pending"]
            if finished:
                table.finish_all(finished, "done")


def is_done(table: StateTable, spec: JobSpec) -> bool:
    """Whether all rows of a job are done."""
    return all((row := table.get(name)) is not None and row.state == "done" for name in spec.rows)


def job_file(spec: JobSpec) -> Path:
    """Path of a job's JSON file, named by its content so that no submission changes the files of another."""
    return Path(spec.table or spec.run_dir) / "jobs" / f"{spec.name}-{short_hash(spec.model_dump_json())}.json"


def short_hash(text: str) -> str:
    """Ten hex digits of the sha256 of a text, for file names."""
    return sha256_text(text)[:10]
