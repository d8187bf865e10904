"""Operating-system processes: free ports, torchrun's environment variables, signals, and ends with the parent."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from fine_dist.core.errors import EXIT_RESUME, LaunchError, ResumeLater


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free at the time of the call; another process may take it before it is used."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Several different TCP ports, free as in `free_port`."""
    with contextlib.ExitStack() as stack:
        # All sockets stay open until the last is bound, or the system could return one port twice.
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def derived_port(*ids: int) -> int:
    """A TCP port that every rank computes alike from the ids of its job, 20000 to 29999."""
    # Primes, so that jobs with neighboring numbers on one machine do not get neighboring
    # or equal ports. The result lies in 20000..29999, below Linux's range of ports for
    # outgoing connections (32768 and up). `slurm/env.sh` computes the same.
    weights = (131, 17, 7)
    return 20000 + sum(number * weight for number, weight in zip(ids, weights)) % 10000


def rank_environment(
    rank: int, world_size: int, local_rank: int, local_size: int, address: str, port: int | str
) -> dict[str, str]:
    """The environment variables of one rank, as torchrun sets them; LOCAL_SIZE is DeepSpeed's LOCAL_WORLD_SIZE."""
    variables = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
        "LOCAL_SIZE": local_size,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {key: str(value) for key, value in variables.items()}


def int_from_env(env: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0) -> int:
    """A whole number from an environment variable.

    Args:
        env: The environment.
        name: Name of the variable.
        default: The value where the variable is absent or empty. None: the variable is required.
        least: Smallest legal value.

    Raises:
        LaunchError: The text is not a whole number, or the number is below `least`.
    """
    text = env.get(name, "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.lstrip("-").isdecimal() and len(text) < 20 and int(text) >= least):
        raise LaunchError(
            f"environment variable {name}: a whole number of {least} or more is needed (got {text[:80]!r}); "
            "launchers set it: unset it to run a single process"
        )
    return int(text)


def seconds_from_env(env: Mapping[str, str], name: str, default: float) -> float:
    """A time in seconds from an environment variable, or `default` where it is absent or empty.

    Raises:
        LaunchError: The text is not a positive number.
    """
    text = env.get(name, "").strip()
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e9:
        raise LaunchError(f"environment variable {name}: seconds, above 0, are needed (got {text[:80]!r}); or unset it")
    return seconds


def current_rank() -> tuple[int, int]:
    """(rank, rank on this node) of this process from torchrun's or srun's variables; (0, 0) for a single process."""
    env = os.environ
    if "RANK" in env:
        return int_from_env(env, "RANK"), int_from_env(env, "LOCAL_RANK", 0)
    if "SLURM_STEP_NUM_TASKS" in env:
        return int_from_env(env, "SLURM_PROCID", 0), int_from_env(env, "SLURM_LOCALID", 0)
    return 0, 0


def rank_for_logs() -> tuple[int, int]:
    """(rank, number of processes) for a log line; (0, 1) where the environment variables are invalid."""
    env = os.environ
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in env and size in env:
            with contextlib.suppress(LaunchError):
                return int_from_env(env, rank), int_from_env(env, size, least=1)
    return 0, 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends (Linux), so that no orphan keeps computing.

    Args:
        parent: Process id that the parent must still have. None: this is not checked.

    Raises:
        SystemExit: The parent has ended already.
    """
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    # The parent may have ended before the call above, and then the kernel sends nothing.
    if parent is not None and os.getppid() != parent:
        raise SystemExit("the process that started this worker is gone")


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """A context in which SIGTERM, SIGUSR1 and SIGUSR2 raise `ResumeLater` in the main thread.

    These are the signals that schedulers send before they end a job. After the first one the others are ignored. The
    previous handlers are restored at the end, as in `restore_handlers`.
    """
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        # A scheduler often sends several signals in a row; a second
        # one must not interrupt the saving that the first has begun.
        for handled in old:
            signal.signal(handled, signal.SIG_IGN)
        raise ResumeLater(f"received {signal.Signals(number).name}; the same command continues")

    # Python sets signal handlers in the main thread only.
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) if main else ()
    old = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        restore_handlers(old, stopped)


def restore_handlers(before: Mapping[signal.Signals, Any], stopped: bool) -> None:
    """Restore signal handlers. After a stop, a signal that had none ends the process with `EXIT_RESUME`.

    A process that was asked to stop takes up to a second to end after it has saved. Without this, a further signal in
    that second would end it with the signal's code, and a scheduler would not start it again.

    Args:
        before: The previous handler of each signal, as `signal.signal` returned it.
        stopped: Whether a signal has asked this process to stop, and its state is saved.
    """
    for number, handler in before.items():
        unhandled = handler is None or handler is signal.SIG_DFL
        signal.signal(number, (_exit_stopped if stopped else signal.SIG_DFL) if unhandled else handler)
    if stopped:
        # The interpreter's cleanup resets every handler except SIG_IGN, and takes most of that second.
        atexit.register(_ignore_signals_of_a_stop)


def _exit_stopped(number: int, frame: object) -> None:
    os._exit(EXIT_RESUME)


def _ignore_signals_of_a_stop() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is _exit_stopped:
            signal.signal(number, signal.SIG_IGN)


def exit_process(code: int) -> NoReturn:
    """End this process: wait for threads, run exit functions and flush, but skip the interpreter's own cleanup.

    With torch loaded, that cleanup takes most of a second.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
