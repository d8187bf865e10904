"""A pool of processes on this machine.

A small server (`fine_dist.worker --pool`) imports torch and the job's module once and forks a clean process per job, so
a task of a fan-out costs milliseconds, not an interpreter's start. A job of several processes gets torchrun's words.
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
from typing import Any

from fine_dist.core.errors import LaunchError
from fine_dist.core.processes import free_port, rank_words
from fine_dist.core.settings import LaunchConfig
from launchers.base import Job, Launcher, joint_code
from launchers.here import check_accelerators
from launchers.machine import fits_here, local_capacity, visible_devices
from launchers.preflight import accelerators
from launchers.spec import Capacity, Finding, JobSpec
from launchers.worker import LIFELINE

GRACE_S = 30.0
"""Seconds a job has to save after SIGTERM before it is killed."""


class LocalLauncher(Launcher):
    """Jobs on this machine.

    threads: CPU threads of a process; None: the job's `cpus_per_process`.
    """

    name = "local"
    on_this_machine = True
    copies_code = False

    def __init__(self, needs: LaunchConfig | None = None, *, threads: int | None = None) -> None:
        super().__init__(needs)
        self._threads = threads
        self._servers: dict[str | None, ForkServer] = {}
        self._devices = visible_devices()
        self._load = dict.fromkeys(self._devices, 0.0)

    @classmethod
    def is_the_one(cls, needs: LaunchConfig) -> bool:
        return True

    def runs_here(self, spec: JobSpec) -> bool:
        return spec.nodes == spec.world_size == 1

    def fits(self, spec: JobSpec) -> int:
        return fits_here(spec, len(self._devices))

    def capacity(self, spec: JobSpec, many: bool = True) -> Capacity:
        return local_capacity(spec, many, self.needs.gpu_memory_gb)

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        return accelerators(spec, len(self._devices))

    def warm(self, spec: JobSpec) -> None:
        """Let the processes' server import what such a job needs while the caller still checks what is to run."""
        self._server(spec).preload(spec)

    def _start(self, job: Job) -> None:
        spec = job.spec
        if spec.nodes > 1:
            raise LaunchError(f"{spec.name} wants {spec.nodes} nodes; local has one: use --launcher slurm or ray")
        check_accelerators(spec)
        devices = self._take(spec.accelerators_per_node)
        env = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        job.handle = self._server(spec).group(spec, job.file, None if job.show else job.log, env)
        job.handle.devices = devices
        job.id = f"local {os.getpid()}.{job.handle.ids[0]}"

    def _check(self, job: Job) -> bool:
        group: ProcessGroup = job.handle
        if not group.ended():
            return False
        self._give_back(job)
        job.code = group.code
        return True

    def _tell(self, job: Job) -> None:
        job.handle.end()

    def _stop(self, job: Job) -> None:
        group: ProcessGroup = job.handle
        while not group.ended():
            group.end()
            time.sleep(0.01)
        self._give_back(job)

    def close(self) -> None:
        super().close()
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def _server(self, spec: JobSpec) -> ForkServer:
        server = self._servers.get(spec.code)
        if server is None or not server.alive:
            server = self._servers[spec.code] = ForkServer(spec, self._threads or spec.cpus_per_process)
        return server

    def _take(self, amount: float) -> list[str]:
        if not amount:
            return []
        count = max(1, round(amount))
        chosen = sorted(self._devices, key=lambda device: self._load[device])[:count]
        for device in chosen:
            self._load[device] += amount / count
        return chosen

    def _give_back(self, job: Job) -> None:
        for device in job.handle.devices:
            self._load[device] -= job.spec.accelerators_per_node / len(job.handle.devices)


class ProcessGroup:
    """The processes of one job on this machine."""

    def __init__(self, server: ForkServer, ids: list[int]) -> None:
        self.ids = ids
        self.devices: list[str] = []
        self._server = server
        self._told: dict[int, float] = {}

    def ended(self) -> bool:
        """Whether all processes have; when one has failed, the others, which would wait for it for ever, are ended."""
        self._server.read()
        codes = [self._server.codes.get(i) for i in self.ids]
        if None in codes and any(code not in (None, 0) for code in codes):
            self.end()
        return None not in codes

    @property
    def code(self) -> int:
        """The joint exit code of processes that have ended."""
        return joint_code([self._server.codes[i] for i in self.ids])

    def end(self) -> None:
        """Every process gets SIGTERM once, and SIGKILL after the grace. To be called until all have ended."""
        now = time.monotonic()
        for i in self.ids:
            if i not in self._told:
                if self._server.signal(i, signal.SIGTERM):
                    self._told[i] = now
            elif now - self._told[i] > GRACE_S:
                self._server.signal(i, signal.SIGKILL)


class ForkServer:
    """Our end of `python -m fine_dist.worker --pool`, which ends with this process.

    spec:    the first job: its code, environment and directory are the server's.
    threads: CPU threads of a process.
    """

    def __init__(self, spec: JobSpec, threads: int) -> None:
        commands_in, self._commands = os.pipe()
        self._replies, replies_out = os.pipe()
        command = [sys.executable, "-m", "fine_dist.worker", "--pool", str(commands_in), str(replies_out)]
        env = {**os.environ, **spec.env, LIFELINE: str(os.getpid())}
        env.setdefault("OMP_NUM_THREADS", str(threads))
        if spec.code:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [spec.code, env.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command, pass_fds=(commands_in, replies_out), env=env, cwd=spec.code or spec.cwd, stdin=subprocess.DEVNULL
        )
        os.close(commands_in)
        os.close(replies_out)
        self._rest = b""
        self._next = 0
        self._pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.alive = True

    def preload(self, spec: JobSpec) -> None:
        """Import what the job will import."""
        self._ask({"preload": spec.module, "code": spec.code})

    def group(self, spec: JobSpec, file: Path, log: Path | None, env: dict[str, str]) -> ProcessGroup:
        """Start a job's processes, with torchrun's words when there are several."""
        size = spec.processes_per_node
        if size == 1:
            return ProcessGroup(self, [self._start(file, env, log)])
        port = free_port()
        ranks = [{**rank_words(rank, size, rank, size, "127.0.0.1", port), **env} for rank in range(size)]
        return ProcessGroup(self, [self._start(file, words, log) for words in ranks])

    def _start(self, file: Path, env: dict[str, str], log: Path | None) -> int:
        self._next += 1
        self._ask({"id": self._next, "job": str(file), "env": env, "log": str(log) if log else None})
        return self._next

    def _ask(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # read() then finds the pool dead and the job lost
            os.write(self._commands, json.dumps(request).encode() + b"\n")

    def read(self) -> None:
        """Take in what the server has said; if it is gone, so are its jobs."""
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
        """Signal a process and its children; False while it is not there yet (or any more)."""
        self.read()
        if i in self.codes or i not in self._pids:
            return False
        try:
            os.killpg(self._pids[i], number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        os.close(self._commands)
        self.read()
        if len(self.codes) == self._next:
            self._process.kill()  # no job is left that it would have to end; its own end takes most of a second
        self._process.wait()
        os.close(self._replies)
