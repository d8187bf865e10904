"""The server of a local pool, which imports everything once and forks a clean process for every job.

`fine_dist.launchers.local.ForkServer` is its client and starts it as `python -m fine_dist.worker --pool IN OUT`.
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
from typing import TextIO, TypedDict

from fine_dist.core.processes import die_with_parent, exit_process
from fine_dist.launchers.spec import JobSpec
from fine_dist.launchers.worker import run_job


class Request(TypedDict, total=False):
    """One request: start a job, or import a module."""

    id: int
    """Number of the process, chosen by the client."""
    job: str
    """Job file."""
    env: dict[str, str]
    """Further environment variables."""
    log: str | None
    """File for the output; None: the server's own output."""
    preload: str
    """Module to import."""
    code: str | None
    """Folder with the copy of the code."""


def serve(commands_fd: int, replies_fd: int) -> int:
    """Fork one process for each job until the input ends; the jobs that still run are then killed.

    Requests are lines of JSON, {"id", "job", "env", "log"} or {"preload", "code"}; replies are {"id", "pid"} and
    {"id", "rc"}. The server stays single-threaded and runs no job itself, because a fork of a process with threads may
    inherit a lock that nobody releases. Each fork thus begins with Python, pydantic and torch imported and nothing
    else.

    Args:
        commands_fd: File descriptor of the requests.
        replies_fd: File descriptor of the replies.

    Returns:
        The exit code of the server.
    """
    children: dict[int, int] = {}
    server = os.getpid()
    for fd in (commands_fd, replies_fd):
        # Programs that a job starts must not keep the pipes open: the
        # client takes the end of the replies for the end of the server.
        os.set_inheritable(fd, False)
    # Line-buffered, so that nothing unwritten is left in the buffer at a fork: the child would write it a second time.
    with open(replies_fd, "w", buffering=1) as replies:
        for request in _requests(commands_fd, lambda: _reap(children, replies)):
            if "preload" in request:
                _preload(request["preload"], request["code"])
                continue
            with contextlib.suppress(Exception):  # the job itself reports a file that cannot be read
                spec = JobSpec.load(request["job"])
                # Imported by the server before it forks, so that every later job of this module finds it in memory.
                _preload(spec.module, spec.code)
            pid = os.fork()
            if pid == 0:
                exit_process(_forked(request, server))
            children[pid] = request["id"]
            print(json.dumps({"id": request["id"], "pid": pid}), file=replies)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            # Each child leads a session of its own (`_forked`), so this reaches its data workers as well.
            os.killpg(pid, signal.SIGKILL)
    return 0


def _requests(fd: int, idle: Callable[[], None]) -> Iterator[Request]:
    pending = b""
    while True:
        idle()
        # A short wait instead of SIGCHLD: a handler would run Python code between any two lines of the server.
        if not select.select([fd], [], [], 0.01)[0]:
            continue
        # From the descriptor itself: `select` does not see what a buffered reader has taken already.
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
    """Import what a job of this module will import. The job itself reports an import that fails, in its log."""
    if module in sys.modules:
        return
    with contextlib.suppress(Exception):
        if code and code not in sys.path:
            sys.path.insert(0, code)
        for name in getattr(importlib.import_module(module), "PRELOAD", ("torch",)):
            importlib.import_module(name)


def _forked(request: Request, server: int) -> int:
    """Run the job in the forked child, in a session, log and environment of its own; returns the exit code."""
    # Ctrl-C in the terminal is for the driver alone, which asks its jobs to save in an order of its own.
    os.setsid()
    die_with_parent(server)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if path := request.get("log"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Appended: the log of a task that is attempted again keeps what the attempt before said.
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {request['job']}", flush=True)
    os.environ.update(request.get("env") or {})
    return run_job(request["job"])
