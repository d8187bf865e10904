"""The server of a local pool, which imports everything once and forks a new process for every job.

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
    """A request: either start a job (`id`, `job`, `env`, `log`), or import a module (`preload`, `code`)."""

    id: int
    """Number by which the client identifies the process."""
    job: str
    """Path of the job file."""
    env: dict[str, str]
    """Further environment variables of the process."""
    log: str | None
    """File to which the output is appended. None: the server's stdout and stderr."""
    preload: str
    """Module to import."""
    code: str | None
    """Folder with the copy of the code that the module is imported from. None: the installed code."""


def serve(commands_fd: int, replies_fd: int) -> int:
    """Fork one process for each job until the input ends, and then kill the jobs that still run.

    Requests are lines of JSON (`Request`); replies are {"id", "pid"} when a process has started, and {"id", "rc"} with
    its exit code, or the negative number of the signal, when it has ended. The server starts no thread and runs no job
    itself: a fork copies only the calling thread, so a lock that another thread holds would never be released.

    Args:
        commands_fd: File descriptor of the requests.
        replies_fd: File descriptor of the replies.

    Returns:
        The exit code of the server.
    """
    children: dict[int, int] = {}  # numbers of the running processes, by process id
    server = os.getpid()
    for fd in (commands_fd, replies_fd):
        # Programs that a job starts must not keep the pipes open, because the client detects a dead server by the end
        # of its replies.
        os.set_inheritable(fd, False)
    # Line-buffered, so that nothing unwritten is left in the buffer at a fork: the child would write it a second time.
    with open(replies_fd, "w", buffering=1) as replies:
        for request in _requests(commands_fd, lambda: _reap(children, replies)):
            if "preload" in request:
                _preload(request["preload"], request["code"])
                continue
            with contextlib.suppress(Exception):  # if the file cannot be read, the job itself reports that
                spec = JobSpec.load(request["job"])
                # Imported before the fork, so that all later jobs of this module find it in memory.
                _preload(spec.module, spec.code)
            pid = os.fork()
            if pid == 0:
                exit_process(_forked(request, server))
            children[pid] = request["id"]
            print(json.dumps({"id": request["id"], "pid": pid}), file=replies)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            # The child leads a process group (`_forked`), so this ends its data workers as well. A child without a
            # group has just been forked; it ends in `die_with_parent`.
            os.killpg(pid, signal.SIGKILL)
    return 0


def _requests(fd: int, idle: Callable[[], None]) -> Iterator[Request]:
    """The requests until the input ends. `idle` is called between them, at least every 10 ms."""
    pending = b""
    while True:
        idle()
        # Children are polled after a short wait. A handler of SIGCHLD could run between any two lines of the server.
        if not select.select([fd], [], [], 0.01)[0]:
            continue
        # Read without a buffer, because `select` does not report data that a buffered reader has already read.
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _reap(children: dict[int, int], replies: TextIO) -> None:
    """Report the processes that have ended, and remove them from `children`."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        print(json.dumps({"id": children.pop(pid), "rc": os.waitstatus_to_exitcode(status)}), file=replies)


def _preload(module: str, code: str | None) -> None:
    """Import a job's module and its `PRELOAD`. If that fails, the job itself reports it, in its log."""
    if module in sys.modules:
        return
    with contextlib.suppress(Exception):
        if code and code not in sys.path:
            sys.path.insert(0, code)
        for name in getattr(importlib.import_module(module), "PRELOAD", ("torch",)):
            importlib.import_module(name)


def _forked(request: Request, server: int) -> int:
    """In the forked child: set up session, output and environment, and run the job; returns the exit code."""
    # In a new session the job does not receive the SIGINT of a Ctrl-C. The driver does, and asks its jobs to save.
    os.setsid()
    die_with_parent(server)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if path := request.get("log"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # The log is appended to, because it has the output of earlier attempts.
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {request['job']}", flush=True)
    os.environ.update(request.get("env") or {})
    return run_job(request["job"])
