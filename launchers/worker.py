"""One process of a job: `run_job` reads a job file and calls `module.run(config)`.

Rank 0 holds the job's rows of the state table while it runs and records how they end.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
import tempfile
import traceback
import typing
from types import ModuleType
from typing import Literal

from fine_dist.core import errors, logs
from fine_dist.core.config import Config, load
from fine_dist.core.errors import ConfigError, FineDistError, LaunchError, ResumeLater
from fine_dist.core.processes import int_from_env
from fine_dist.launchers.spec import JobSpec
from fine_dist.launchers.state_table import FINAL, StateTable

log = logging.getLogger(__name__)

EXIT_BUSY = 76
"""Exit code of a process that found its task locked by another live process."""
EXIT_FILE = "FINE_DIST_EXIT_FILE"
"""Environment variable: file that stands for exit code 75, because torchrun ends with 1 for all failures."""
JOB_ENV = "FINE_DIST_JOB"
"""Environment variable: the job file, inside a worker. Commands there run in place instead of submitting jobs."""
PARENT_ENV = "FINE_DIST_DIE_WITH_PARENT"
"""Environment variable: process id of the parent. A worker is killed when that process ends."""
SCRATCH = "FINE_DIST_SCRATCH"
"""Environment variable: folder on the node's local disk, from the site file. It is not called SCRATCH, because on many
clusters that variable names a shared file system."""
GPU_REQUIRED = "FINE_DIST_GPU_REQUIRED"
"""Environment variable, set to 1 for a job that asked for accelerators: its processes never compute on the CPU."""


def run_job(path: str) -> int:
    """Run one process of a job.

    Args:
        path: The job file.

    Returns:
        The exit code: 0 done, 1 crashed, 2 a user's error, 3 some tasks of a pack failed, 75 to be started again, 76
        another live process runs the task.
    """
    logs.configure()
    return errors.guard(lambda: _run_job(path))


def inside() -> bool:
    """Whether this process belongs to a job: a worker, or a process of torchrun, deepspeed or srun."""
    return JOB_ENV in os.environ or ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or _in_step()


def world_size() -> int:
    """Number of processes that torchrun or srun started together with this one; 1 alone.

    Raises:
        LaunchError: The environment variable is not a number.
    """
    if "RANK" in os.environ:
        return int_from_env(os.environ, "WORLD_SIZE", 1)
    return int_from_env(os.environ, "SLURM_STEP_NUM_TASKS", 1) if _in_step() else 1


def _in_step() -> bool:
    """Whether srun started this process.

    Batch scripts and interactive shells have SLURM_PROCID=0 too, but no step, or one with a reserved number (above
    0xfffffff0).
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and step.isdecimal() and int(step) < 0xFFFFFFF0


def _run_job(path: str) -> int:
    path = os.path.abspath(path)
    spec = JobSpec.load(path)
    os.environ.update(spec.env)
    if spec.accelerators_per_node:
        os.environ[GPU_REQUIRED] = "1"
    os.environ[JOB_ENV] = path
    _use_scratch()
    os.chdir(spec.cwd)
    sys.path[0:0] = [spec.code] if spec.code and spec.code not in sys.path else []
    if spec.table is None or rank() != 0:
        return _call(spec)
    table = StateTable(spec.table)
    # Rank 0 holds one lock per task for all ranks, because its process lives as long as the job.
    claim = table.claim(spec.rows)
    if claim is None:
        others = ", ".join(f"{r.name} ({r.host}, process {r.pid})" for n in spec.rows if (r := table.get(n)))
        log.warning("another live process runs this task: %s", others)
        return EXIT_BUSY
    with claim:
        return _run_with_rows(spec, table)


def _use_scratch() -> None:
    """Put temporary files and compiled kernels on the node's local disk, if the site file names a folder there."""
    folder = os.environ.get(SCRATCH)
    if folder:
        os.makedirs(folder, exist_ok=True)
        os.environ |= {"TMPDIR": folder, "TORCH_EXTENSIONS_DIR": os.path.join(folder, "torch")}
        tempfile.tempdir = None  # forget the folder that tempfile may have chosen before


def _run_with_rows(spec: JobSpec, table: StateTable) -> int:
    """Run the job and record its start and its end in its rows of the state table."""
    # Rows may have been completed since the submission, by another launcher or an earlier start of this pack.
    open_rows = [n for n in spec.rows if (row := table.get(n)) is None or row.state != "done"]
    if not open_rows:
        log.info("%s: done already", spec.name)
        return 0
    table.start_all(open_rows, scheduler_job())

    def close(state: Literal["pending", "done", "failed"], reason: str | None = None) -> None:
        # A pack records the end of each target itself; those rows stay as they are.
        table.finish_all([n for n in open_rows if (r := table.get(n)) is None or r.state not in FINAL], state, reason)

    try:
        code = _call(spec)
    except ResumeLater as stop:
        # Recorded before the error propagates: a requeued job may start on another node before this process ends.
        close("pending", f"stopped: {stop}")
        raise
    except FineDistError as error:
        close("failed", str(error))
        raise
    except KeyboardInterrupt:
        close("pending", "interrupted")
        raise
    # Every exception, SystemExit included: a row must not stay `running` after its process
    # has ended. Only a killed process leaves such a row, and `StateTable.lost` detects it.
    except BaseException as error:
        close("failed", f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
    close("done" if code == 0 else "failed", None if code == 0 else f"exit code {code}")
    failed = [n for n in spec.rows if (row := table.get(n)) and row.state == "failed"]
    return errors.EXIT_TASKS_FAILED if failed and code == 0 else code


def _call(spec: JobSpec) -> int:
    module = import_module(spec.module)
    return exit_code(module.run(load(config_class(module), spec.config)))


def exit_code(result: object) -> int:
    """The exit code for the result of a stage's `run`: an int is the code itself, anything else means 0."""
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def import_module(name: str) -> ModuleType:
    """Import the module of a job; of a package that is also a command (`fine_dist.creative`), its `command` module.

    Raises:
        LaunchError: It cannot be imported, or has no `run`.
    """
    try:
        module = importlib.import_module(name)
        if hasattr(module, "__path__") and importlib.util.find_spec(f"{name}.command"):
            module = importlib.import_module(f"{name}.command")
    except ModuleNotFoundError as error:
        raise LaunchError(f"module {name}: {error}; it must be importable in {os.getcwd()}") from None
    if not callable(getattr(module, "run", None)):
        raise LaunchError(f"module {name} has no run(config); a job's module needs one")
    return module


def config_class(module: ModuleType) -> type[Config]:
    """The config class of a job's module: the annotation of the first parameter of its `run`.

    Raises:
        ConfigError: The parameter is not annotated with a config class.
    """
    parameters: list[str] = list(inspect.signature(module.run).parameters)
    kind: object = typing.get_type_hints(module.run).get(parameters[0]) if parameters else None
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        raise ConfigError(f"{module.__name__}.run: its first parameter must be annotated with a config class")
    return kind


def rank() -> int:
    """Global rank of this process as torchrun or srun numbered it; 0 alone.

    Raises:
        LaunchError: The environment variable is not a number.
    """
    if "RANK" in os.environ:
        return int_from_env(os.environ, "RANK")
    return int_from_env(os.environ, "SLURM_PROCID") if _in_step() else 0


def scheduler_job() -> str | None:
    """The scheduler's name of the job that this process belongs to, such as `slurm 12_3`; None outside of one."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"slurm {env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    if "SLURM_JOB_ID" in env:
        return f"slurm {env['SLURM_JOB_ID']}"
    return f"ray {env['RAY_JOB_ID']}" if "RAY_JOB_ID" in env else None
