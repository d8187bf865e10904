"""From a config to job files: the resolved config, one `JobSpec` a task, all on disk, and rows of the state table."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fine_dist.core.config import Config, dump_yaml, run_dir_of
from fine_dist.core.errors import LaunchError
from fine_dist.core.files import sha256_text, sync_disk, write_atomic
from fine_dist.core.settings import LaunchConfig
from launchers.spec import Capacity, JobSpec, Task
from launchers.state_table import StateTable
from launchers.worker import import_module


def launch_of(config: Config) -> LaunchConfig:
    """The launch settings of a stage's config; defaults when it has none."""
    launch = getattr(config, "launch", None)
    return launch if isinstance(launch, LaunchConfig) else LaunchConfig()


def fans_out(module: str) -> bool:
    """Whether a module may be many tasks: it has `tasks(config)`, or `tasks(config, capacity)`."""
    return callable(getattr(import_module(module), "tasks", None))


def tasks_of(module: str, config: Config, capacity: Capacity | None = None) -> list[Task] | None:
    """The tasks of a fan-out, or None when the module is one job. Raises `LaunchError` when two tasks share a name.

    capacity: the machines they will run on; handed on when the module's `tasks` takes a second argument.
    """
    if not fans_out(module):
        return None
    make: Callable[..., list[Task] | None] = import_module(module).tasks
    takes_room = len(inspect.signature(make).parameters) > 1
    tasks = make(config, capacity) if takes_room else make(config)
    if tasks is None:
        return None
    names = [row for task in tasks for row in (task.rows or (task.name,))]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise LaunchError(f"{module}: two tasks are named {twice[0]!r}")
    return tasks


def make_spec(
    module: str, config: Config, name: str | None = None, *, code: str | None = None, table: Path | None = None,
    rows: Sequence[str] = (), write: bool = True, durable: bool = True,
    known: dict[str, tuple[Any, str]] | None = None,
) -> JobSpec:  # fmt: skip
    """The job of one config, whose resolved YAML is written into the run directory (unless `write` is false).

    known: what the tasks of a fan-out share of their YAML (`dump_yaml`).

    File names carry a hash of what they hold: a second submission never changes the files of the first.
    """
    launch = launch_of(config)
    run_dir = run_dir_of(config)
    name = name or module.rpartition(".")[2]
    text = dump_yaml(config, known)
    home = table or run_dir
    path = home / "jobs" / f"{name}-{short_hash(text)}.yaml"
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


def make_specs(module: str, config: Config, tasks: Sequence[Task], *, code: str | None = None) -> list[JobSpec]:
    """The jobs of a fan-out, their configs and job files on disk, and their pending rows in the state table."""
    home = run_dir_of(config)
    launch = launch_of(config)
    specs = []
    run_dirs: dict[str, str] = {}
    known: dict[str, tuple[Any, str]] = {}
    for task in tasks:
        part = task.config
        if "launch" in type(part).model_fields:
            part = part.model_copy(update={"launch": launch})
        spec = make_spec(module, part, task.name, code=code, table=home, rows=task.rows, durable=False, known=known)
        spec.save(job_file(spec), durable=False)
        run_dirs |= dict.fromkeys(spec.rows, spec.run_dir)
        specs.append(spec)
    if specs:
        sync_disk(home)  # once for all of them
    StateTable(home).add([row for spec in specs for row in spec.rows], run_dirs)
    return specs


def is_done(table: StateTable, spec: JobSpec) -> bool:
    """Whether all rows of a job are done."""
    return all((row := table.get(name)) is not None and row.state == "done" for name in spec.rows)


def job_file(spec: JobSpec) -> Path:
    """Where a job's JSON lies: named by its content, so that no submission changes the files of another."""
    return Path(spec.table or spec.run_dir) / "jobs" / f"{spec.name}-{short_hash(spec.model_dump_json())}.json"


def short_hash(text: str) -> str:
    """Ten hex digits that tell one content from another in a file name."""
    return sha256_text(text)[:10]
