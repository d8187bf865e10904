"""This machine: a pool of processes (`local`), and the current process (`here`).

The pool is a small server (`fine_dist.worker --pool`) that imports torch and the job's module once and forks a new
process for every job, so that a task of a fan-out starts in milliseconds instead of seconds. A job of several processes
gets the environment variables that torchrun would set.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from fine_dist.core.config import Config
from fine_dist.core.errors import LaunchError
from fine_dist.core.processes import free_port, rank_environment
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.launch_target import CommandTarget, register
from fine_dist.launchers.launcher import Job, Launcher, joint_code
from fine_dist.launchers.machine import (
    fits_here,
    local_capacity,
    missing_accelerators,
    require_accelerators,
    visible_devices,
)
from fine_dist.launchers.prepare import make_spec
from fine_dist.launchers.spec import Capacity, Finding, JobSpec
from fine_dist.launchers.worker import PARENT_ENV, exit_code, import_module, inside

GRACE_S = 30.0
"""Seconds that a job has to save after SIGTERM before it is killed."""


@register
class Here(CommandTarget):
    """Runs a command in this process, its tasks one after the other. Inside a job, every command uses this target."""

    name = "here"
    on_this_machine = True

    def run(self, module: str, config: Config) -> int:
        if not inside():  # inside a job, its launcher has chosen the accelerators
            require_accelerators(make_spec(module, config, write=False))
        return run_here(module, config)

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        missing = missing_accelerators(spec)
        return [missing] if missing else []


def run_here(module: str, config: Config) -> int:
    """Run `module.run(config)` in this process; returns the exit code."""
    return exit_code(import_module(module).run(config))


@register
class LocalLauncher(Launcher):
    """A pool of processes on this machine.

    Args:
        needs: The `launch` settings of the config. None: the defaults.
        threads: CPU threads of each process. None: the job's `cpus_per_process`.
    """

    name = "local"
    on_this_machine = True
    copies_code = False

    def __init__(self, needs: LaunchConfig | None = None, *, threads: int | None = None) -> None:
        super().__init__(needs)
        self._threads = threads
        self._servers: dict[str | None, ForkServer] = {}
        # The share of each accelerator that running jobs use; empty until a job requests one.
        self._load: dict[str, float] = {}

    @classmethod
    def affinity(cls, needs: LaunchConfig) -> int:
        return 10  # wherever nothing else matches

    def runs_here(self, spec: JobSpec) -> bool:
        return spec.nodes == spec.world_size == 1

    def fits(self, spec: JobSpec) -> int:
        return fits_here(spec, len(visible_devices()) if spec.accelerators_per_node else 0)

    def capacity(self, spec: JobSpec, many: bool = True) -> Capacity:
        return local_capacity(spec, many, self.needs.gpu_memory_gb)

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        missing = missing_accelerators(spec)
        return [missing] if missing else []

    def warm(self, spec: JobSpec) -> None:
        self._server(spec).preload(spec)

    def _start(self, job: Job) -> None:
        spec = job.spec
        if spec.nodes > 1:
            raise LaunchError(f"{spec.name} wants {spec.nodes} nodes; local has one: use --launcher slurm or ray")
        require_accelerators(spec)
        # Least used first, so that jobs which share accelerators spread over all of them.
        devices = self._take(spec.accelerators_per_node)
        env = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        group = self._server(spec).group(spec, job.file, None if job.show else job.log, env)
        group.devices = devices
        job.handle = group
        job.id = f"local {os.getpid()}.{group.ids[0]}"

    def _check(self, job: Job) -> bool:
        group = _group_of(job)
        if not group.ended():
            return False
        self._release(job)
        job.code = group.code
        return True

    def _request_stop(self, job: Job) -> None:
        _group_of(job).end()

    def _stop(self, job: Job) -> None:
        group = _group_of(job)
        # `end` sends SIGTERM at its first call, and SIGKILL at a call after the grace period.
        while not group.ended():
            group.end()
            time.sleep(0.01)
        self._release(job)

    def close(self) -> None:
        super().close()
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def _server(self, spec: JobSpec) -> ForkServer:
        server = self._servers.get(spec.code)
        # One server for each copy of the code, because a module that a server has imported from one folder cannot be
        # imported from another.
        if server is None or not server.alive:
            server = self._servers[spec.code] = ForkServer(spec, self._threads or spec.cpus_per_process)
        return server

    def _take(self, amount: float) -> list[str]:
        """Assign the least used accelerators to a job that requests `amount` of them; returns their names."""
        if not amount:
            return []
        self._load = self._load or dict.fromkeys(visible_devices(), 0.0)
        count = max(1, round(amount))
        chosen = sorted(self._load, key=self._load.__getitem__)[:count]
        for device in chosen:
            self._load[device] += amount / count
        return chosen

    def _release(self, job: Job) -> None:
        devices = _group_of(job).devices
        for device in devices:
            self._load[device] -= job.spec.accelerators_per_node / len(devices)


def _group_of(job: Job) -> ProcessGroup:
    assert isinstance(job.handle, ProcessGroup)
    return job.handle


class ProcessGroup:
    """The processes of one job on this machine.

    Args:
        server: The server that forked them.
        ids: Numbers by which the server identifies them (not process ids).

    Attributes:
        devices: Names of the accelerators that the job uses.
    """

    def __init__(self, server: ForkServer, ids: list[int]) -> None:
        self.ids = ids
        self.devices: list[str] = []
        self._server = server
        self._signaled: dict[int, float] = {}  # time.monotonic() when a process was sent SIGTERM, by its number

    def ended(self) -> bool:
        """Whether all processes have ended. If one has failed, the others are asked to end."""
        self._server.read()
        codes = [self._server.codes.get(i) for i in self.ids]
        # Ranks that wait for a failed one in a collective would wait until its timeout, which is 10 to 30 minutes.
        if None in codes and any(code not in (None, 0) for code in codes):
            self.end()
        return None not in codes

    @property
    def code(self) -> int:
        """The exit code of the job (`joint_code`). Only valid once all processes have ended."""
        return joint_code([self._server.codes[i] for i in self.ids])

    def end(self) -> None:
        """Send each process SIGTERM once, and SIGKILL after `GRACE_S`. Never blocks: call it until all have ended."""
        now = time.monotonic()
        for i in self.ids:
            if i not in self._signaled:
                if self._server.signal(i, signal.SIGTERM):
                    self._signaled[i] = now
            elif now - self._signaled[i] > GRACE_S:
                self._server.signal(i, signal.SIGKILL)


class ForkServer:
    """Client of `python -m fine_dist.worker --pool`, a server that ends with this process.

    Args:
        spec: The first job; its code, environment and working directory become the server's.
        threads: CPU threads of each process (OMP_NUM_THREADS), unless the environment states them.

    Attributes:
        codes: Exit codes of the processes that have ended, by number; -9 for those that were lost with the server.
        alive: Whether the server ran when its replies were last read.
    """

    def __init__(self, spec: JobSpec, threads: int) -> None:
        commands_in, self._commands = os.pipe()
        self._replies, replies_out = os.pipe()
        command = [sys.executable, "-m", "fine_dist.worker", "--pool", str(commands_in), str(replies_out)]
        env = {**os.environ, **spec.env, PARENT_ENV: str(os.getpid())}
        env.setdefault("OMP_NUM_THREADS", str(threads))
        if spec.code:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [spec.code, env.get("PYTHONPATH")]))
        # Requests and replies use two more pipes, because jobs inherit the server's stdout and stderr.
        self._process = subprocess.Popen(
            command, pass_fds=(commands_in, replies_out), env=env, cwd=spec.code or spec.cwd, stdin=subprocess.DEVNULL
        )
        # The server's ends are closed in this process. Otherwise the pipes would stay open when the server dies, and
        # this process would see neither the end of the replies nor an error when it writes.
        os.close(commands_in)
        os.close(replies_out)
        self._rest = b""
        self._next = 0
        self._pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.alive = True

    def preload(self, spec: JobSpec) -> None:
        """Make the server import the job's modules now, in the background."""
        self._send({"preload": spec.module, "code": spec.code})

    def group(self, spec: JobSpec, file: Path, log: Path | None, env: dict[str, str]) -> ProcessGroup:
        """Start the processes of a job. If there are several, they get torchrun's environment variables.

        Args:
            spec: The job.
            file: Its JSON file.
            log: File to which their output is appended. None: the output of this process.
            env: Further environment variables of each process.
        """
        size = spec.processes_per_node
        if size == 1:
            return ProcessGroup(self, [self._start(file, env, log)])
        # A new port for every start, because the port of a killed attempt may still be in the state TIME_WAIT.
        port = free_port()
        ranks = [{**rank_environment(rank, size, rank, size, "127.0.0.1", port), **env} for rank in range(size)]
        return ProcessGroup(self, [self._start(file, variables, log) for variables in ranks])

    def _start(self, file: Path, env: dict[str, str], log: Path | None) -> int:
        self._next += 1
        self._send({"id": self._next, "job": str(file), "env": env, "log": str(log) if log else None})
        return self._next

    def _send(self, request: dict[str, object]) -> None:
        # The server may have died. `read` then sees the end of its replies and sets the exit codes of its jobs.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._commands, json.dumps(request).encode() + b"\n")

    def read(self) -> None:
        """Read the server's replies without blocking. If the server has died, its jobs count as killed (code -9)."""
        # The timeout of 0 makes `select` return at once: the launcher polls many jobs, and there may be no reply.
        while self.alive and select.select([self._replies], [], [], 0)[0]:
            chunk = os.read(self._replies, 1 << 16)
            if not chunk:
                self.alive = False
                break
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                reply = json.loads(line)
                if "pid" in reply:
                    self._pids[reply["id"]] = reply["pid"]
                else:
                    self.codes[reply["id"]] = reply["rc"]
        if not self.alive:
            for i in range(1, self._next + 1):
                self.codes.setdefault(i, -signal.SIGKILL)

    def signal(self, i: int, number: int) -> bool:
        """Send a signal to a process and its children.

        Args:
            i: Number of the process.
            number: Number of the signal.

        Returns:
            False if the process has not started yet or has ended, so that nothing was sent.
        """
        self.read()
        if i in self.codes or i not in self._pids:
            return False
        try:
            # The process is the leader of a group that includes its data workers, which must end with it.
            os.killpg(self._pids[i], number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """End the server, which kills the jobs that still run."""
        os.close(self._commands)  # the server ends at the end of its input
        self.read()
        if len(self.codes) == self._next:
            # All jobs have ended, so the server has nothing to clean up, and a normal exit takes most of a second.
            self._process.kill()
        self._process.wait()
        os.close(self._replies)
