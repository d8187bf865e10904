"""Words between processes of one machine: ports, torchrun's variables, dying with one's parent, ending at once."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from fine_dist.core.errors import ResumeLater


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different TCP ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def derived_port(*words: int) -> int:
    """A port that all ranks of a job derive alike from its numbers, below those that the system hands out."""
    weights = (131, 17, 7)
    return 20000 + sum(word * weight for word, weight in zip(words, weights)) % 10000


def rank_words(
    rank: int, world_size: int, local_rank: int, local_size: int, address: str, port: int | str
) -> dict[str, str]:
    """The environment of one rank in torchrun's words; LOCAL_SIZE is DeepSpeed's name of LOCAL_WORLD_SIZE."""
    words = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
        "LOCAL_SIZE": local_size,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {key: str(value) for key, value in words.items()}


def rank_here() -> tuple[int, int]:
    """(rank, rank on this node) of this process in torchrun's words, or srun's; (0, 0) alone."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_STEP_NUM_TASKS" in env:
        return int(env.get("SLURM_PROCID", 0)), int(env.get("SLURM_LOCALID", 0))
    return 0, 0


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends (Linux), so that no orphan goes on computing.

    parent: the process id that must still be the parent's; `SystemExit` when it has gone already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        raise SystemExit("the process that started this worker is gone")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGUSR2 raise `ResumeLater` in the main thread; the old handlers come back afterwards.

    These are what schedulers send before they end a job. Further ones are ignored, while the first is acted upon.
    """

    def stop(number: int, frame: object) -> None:
        for known in old:
            signal.signal(known, signal.SIG_IGN)
        raise ResumeLater(f"received {signal.Signals(number).name}; the same command continues")

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) if main else ()
    old = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def leave(code: int) -> NoReturn:
    """End this process as the interpreter does, with its threads, exit functions and output, but do not take it apart:
    with torch loaded that takes most of a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
