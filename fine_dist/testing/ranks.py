"""The test tool for several processes: `run_distributed(fn, world_size)` runs a function on real ranks (gloo).

Ranks are forked from a small server that has imported torch and the engine once, so that four ranks start in a fraction
of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fine_dist.core import logs
from fine_dist.core.processes import free_port, rank_environment

_QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "error", "TQDM_DISABLE": "1"}


class Ranks:
    """Running ranks. A test may kill `processes[r].pid`; rank N prints to `logs/rankN.log`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        env: dict[str, str] | None = None,
        logs: Path | None = None,
    ) -> None:
        context = _server()
        port = free_port()
        self.processes = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            torchrun_variables = rank_environment(rank, world_size, rank, world_size, "127.0.0.1", port)
            variables = {**_QUIET, **torchrun_variables, **(env or {})}
            log = str(logs / f"rank{rank}.log") if logs else None
            process = context.Process(target=_rank, args=(fn, args, variables, sender, log), daemon=True)
            process.start()
            # The parent's copy of the sender is closed, so that the pipe reports EOF when the rank ends.
            sender.close()
            self.processes.append(process)
            self._pipes.append(receiver)

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Exit codes in rank order, negative for a signal. `TimeoutError` when a rank runs too long."""
        until = time.monotonic() + timeout_s
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                self.kill()
                raise TimeoutError(f"rank {rank} of {len(self.processes)} still ran after {timeout_s:g} s")
        return [process.exitcode or 0 for process in self.processes]

    def results(self, timeout_s: float = 120) -> list[Any]:
        """Return values of the ranks, in rank order. `RuntimeError` with the traceback of the first rank that fails."""
        values: dict[int, Any] = {}
        until = time.monotonic() + timeout_s
        while len(values) < len(self._pipes):
            left = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in values}
            ready = wait(list(left), max(0.0, until - time.monotonic()))
            if not ready:
                self.kill()
                raise TimeoutError(f"ranks {sorted(left.values())} gave no result within {timeout_s:g} s")
            for pipe in ready:
                rank = left[pipe]  # type: ignore[index]
                try:
                    good, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    self.kill()
                    self.processes[rank].join()
                    raise RuntimeError(f"rank {rank} ended with exit code {self.processes[rank].exitcode}") from None
                if not good:
                    self.kill()
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                values[rank] = value
        self.wait(max(1.0, until - time.monotonic()))
        return [values[rank] for rank in range(len(self._pipes))]

    def kill(self) -> None:
        """Kill the ranks that still run."""
        for process in self.processes:
            if process.exitcode is None:
                process.kill()


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `fn(*args)` in `world_size` processes with torchrun's environment variables; returns their results.

    Args:
        fn: A function at the top level of a module; it calls `engine.dist.world()` itself.
        world_size: Number of ranks.
        args: Arguments of the function.
        timeout_s: Seconds until all ranks are killed.
        env: Further environment variables.

    Raises:
        RuntimeError: A rank failed; the message has its traceback.
        TimeoutError: The ranks took too long.
    """
    ranks = Ranks(fn, world_size, *args, env=env)
    try:
        return ranks.results(timeout_s)
    finally:
        ranks.kill()


def preloaded() -> list[str]:
    """Modules that the server imports for all ranks.

    DeepSpeed chooses its accelerator when it is imported. On a machine with a GPU each rank imports it, for the device
    of its test.
    """
    modules = ["torch.utils.tensorboard", "fine_dist.engine.fit", "fine_dist.testing"]
    return modules if torch.cuda.is_available() else [*modules, "deepspeed", "fine_dist.engine.deepspeed_backend"]


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded())
    # torch reads these variables when the server imports it; the forked ranks inherit the result.
    before = {key: os.environ.get(key) for key in _QUIET}
    os.environ.update(_QUIET)
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value
    return context


def _rank(fn: Callable[..., Any], args: Sequence[Any], env: dict[str, str], pipe: Connection, log: str | None) -> None:
    os.environ.update(env)
    if log:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    logs.configure()
    try:
        value = fn(*args)
    except SystemExit:
        raise
    except BaseException:
        _send(pipe, (False, traceback.format_exc()))
        raise
    _send(pipe, (True, value))
    pipe.close()


def _send(pipe: Connection, value: Any) -> None:
    """Send by value: `Connection.send` would share a tensor's memory with a process that is about to end."""
    pipe.send_bytes(pickle.dumps(value))
