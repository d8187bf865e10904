"""Where every launcher ends: `python -m fine_dist.worker JOB.json` runs `module.run(config)` of one job.

    python -m fine_dist.worker JOB.json          one process of a job (torchrun, srun, Ray and a pool set its rank)
    python -m fine_dist.worker --pool IN OUT     a server for `launchers.local`: one fork per job, imports paid once

Exit codes: 0 done, 1 crashed, 2 a user's error, 3 some tasks of a pack failed, 75 start it again, 76 another live
process runs this task.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import json
import os
import select
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fine_dist import errors
from fine_dist.config import Config, load
from fine_dist.errors import ConfigError, FineDistError, LaunchError, ResumeLater
from fine_dist.jobs import FINAL, JobSpec, StateTable

EXIT_BUSY = 76
"""Another live process runs the task."""
NOTE = "FINE_DIST_EXIT_FILE"
"""A file that takes exit code 75 under torchrun, which itself ends with 1 whatever its workers end with."""
MARK = "FINE_DIST_JOB"
"""Environment variable that holds the job file inside a worker: commands run here instead of submitting again."""
LIFELINE = "FINE_DIST_DIE_WITH_PARENT"
"""Set to the process id of the one that starts a worker: the worker is killed when that process is gone."""


def main(argv: list[str] | None = None) -> int:
    """The command."""
    argv = sys.argv[1:] if argv is None else argv
    parent = os.environ.pop(LIFELINE, None)
    if parent:
        die_with(int(parent))
    if len(argv) == 3 and argv[0] == "--pool":
        return _pool(int(argv[1]), int(argv[2]))
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m fine_dist.worker JOB.json", file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else errors.EXIT_USER_ERROR
    code = run_job(argv[0])
    note = os.environ.get(NOTE)
    if code == errors.EXIT_RESUME and note:
        Path(note).write_text(f"{code}\n")
        return 0
    return code


def inside() -> bool:
    """Whether this process is one of a job already: our worker, or started by torchrun, deepspeed or srun."""
    return MARK in os.environ or ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or _in_step()


def _in_step() -> bool:
    """Whether srun started this process. Batch scripts and interactive shells have SLURM_PROCID=0 too, but no step or
    one with a reserved number (above 0xfffffff0)."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in os.environ and step.isdecimal() and int(step) < 0xFFFFFFF0


def run_job(path: str) -> int:
    """Run one process of a job; the exit code. Rank 0 keeps the job's rows of the state table."""
    return errors.guard(lambda: _run_job(path))


def _run_job(path: str) -> int:
    path = os.path.abspath(path)
    spec = JobSpec.load(path)
    os.environ.update(spec.env)
    os.environ[MARK] = path
    os.chdir(spec.cwd)
    sys.path[0:0] = [spec.code] if spec.code and spec.code not in sys.path else []
    if spec.table is None or rank() != 0:
        return _call(spec)
    table = StateTable(spec.table)
    claim = table.claim(spec.rows)
    if claim is None:
        others = ", ".join(f"{r.name} ({r.host}, process {r.pid})" for n in spec.rows if (r := table.get(n)))
        print(f"another process runs this task; left to it: {others}", file=sys.stderr)
        return EXIT_BUSY
    with claim:
        return _keep_rows(spec, table)


def _keep_rows(spec: JobSpec, table: StateTable) -> int:
    open_rows = [n for n in spec.rows if (row := table.get(n)) is None or row.state != "done"]
    if not open_rows:
        print(f"{spec.name}: done already")
        return 0
    for name in open_rows:
        table.start(name, scheduler_job())

    def close(state: typing.Literal["pending", "done", "failed"], reason: str | None = None) -> None:
        for name in open_rows:  # a pack writes rows of its own while it runs; those stay
            row = table.get(name)
            if row is None or row.state not in FINAL:
                table.finish(name, state, reason)

    try:
        code = _call(spec)
    except ResumeLater as stop:
        close("pending", f"stopped: {stop}")
        raise
    except FineDistError as error:
        close("failed", str(error))
        raise
    except KeyboardInterrupt:
        close("pending", "interrupted")
        raise
    except BaseException as error:
        close("failed", f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
    close("done" if code == 0 else "failed", None if code == 0 else f"exit code {code}")
    failed = [n for n in spec.rows if (row := table.get(n)) and row.state == "failed"]
    return errors.EXIT_TASKS_FAILED if failed and code == 0 else code


def _call(spec: JobSpec) -> int:
    module = import_module(spec.module)
    result = module.run(load(config_class(module), spec.config))
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def import_module(name: str) -> ModuleType:
    """The module of a job. `LaunchError` when it is not there or has no `run`."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LaunchError(f"module {name}: {error}; it must be importable in {os.getcwd()}") from None
    if not callable(getattr(module, "run", None)):
        raise LaunchError(f"module {name} has no run(config); a job's module needs one")
    return module


def config_class(module: ModuleType) -> type[Config]:
    """The config class of a job's module: the annotation of the first parameter of its `run`."""
    parameters: list[str] = list(inspect.signature(module.run).parameters)
    kind: Any = typing.get_type_hints(module.run).get(parameters[0]) if parameters else None
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        raise ConfigError(f"{module.__name__}.run: its first parameter must be annotated with a config class")
    return kind


def rank() -> int:
    """This process's global rank in torchrun's or SLURM's words; 0 alone."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if _in_step() else 0


def scheduler_job() -> str | None:
    """The scheduler's name of the job this process belongs to, such as `slurm 12_3` or `ray 02000000`."""
    env = os.environ
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"slurm {env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    if "SLURM_JOB_ID" in env:
        return f"slurm {env['SLURM_JOB_ID']}"
    return f"ray {env['RAY_JOB_ID']}" if "RAY_JOB_ID" in env else None


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends (Linux), so that no orphan goes on computing."""
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit("the process that started this worker is gone")


# --- the pool's server ---------------------------------------------------------------------------------------------


def _pool(commands_fd: int, replies_fd: int) -> int:
    """Fork one process a job.

    Lines in: {"id", "job", "env", "log"} or {"preload", "code"}; lines out: {"id", "pid"} and {"id", "rc"}.

    The server itself stays single-threaded and runs no job, so a fork is a clean process in which Python, pydantic and
    torch are imported already. It ends with its input, and its jobs with it.
    """
    children: dict[int, int] = {}
    server = os.getpid()
    for fd in (commands_fd, replies_fd):
        os.set_inheritable(fd, False)
    with open(replies_fd, "w", buffering=1) as replies:
        for request in _requests(commands_fd, lambda: _reap(children, replies)):
            if "preload" in request:
                _preload(request["preload"], request["code"])
                continue
            with contextlib.suppress(Exception):  # a job file that cannot be read is the job's own trouble
                spec = JobSpec.load(request["job"])
                _preload(spec.module, spec.code)
            pid = os.fork()
            if pid == 0:
                return _forked(request, server)
            children[pid] = request["id"]
            print(json.dumps({"id": request["id"], "pid": pid}), file=replies)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return 0


def _requests(fd: int, idle: Callable[[], None]) -> Iterator[dict[str, Any]]:
    pending = b""
    while True:
        idle()
        if not select.select([fd], [], [], 0.01)[0]:
            continue
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _reap(children: dict[int, int], replies: typing.TextIO) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        print(json.dumps({"id": children.pop(pid), "rc": os.waitstatus_to_exitcode(status)}), file=replies)


def _preload(module: str, code: str | None) -> None:
    """Import what a job of this module will import. Trouble is left to the job itself, which reports it in its log."""
    if module in sys.modules:
        return
    with contextlib.suppress(Exception):
        if code and code not in sys.path:
            sys.path.insert(0, code)
        for name in getattr(importlib.import_module(module), "PRELOAD", ("torch",)):
            importlib.import_module(name)


def _forked(request: dict[str, Any], server: int) -> int:
    """The child's life after the fork: its own group, log and environment, then the job."""
    os.setsid()
    die_with(server)
    quiet = os.open(os.devnull, os.O_RDONLY)
    os.dup2(quiet, 0)
    if request.get("log"):
        Path(request["log"]).parent.mkdir(parents=True, exist_ok=True)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {request['job']}", flush=True)
    os.environ.update(request.get("env") or {})
    return run_job(request["job"])


if __name__ == "__main__":
    raise SystemExit(main())
