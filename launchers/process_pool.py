"""The server of a local pool: imports are paid once, and every job is a clean fork.

`serve` is the far end of `launchers.local.ForkServer`, which starts it as `python -m fine_dist.worker --pool IN OUT`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fine_dist.core.processes import die_with_parent, leave
from launchers.spec import JobSpec
from launchers.worker import run_job


def serve(commands_fd: int, replies_fd: int) -> int:
    """Fork one process a job; the exit code of the server. A fork ends with its job's.

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
                leave(_forked(request, server))
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


def _reap(children: dict[int, int], replies: TextIO) -> None:
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
    die_with_parent(server)
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
