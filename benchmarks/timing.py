"""Wall-clock time of whole programs that run alternately in time slices; only a program's own slices count.

A shared machine can be slow for minutes. Two programs run one after the other would measure that; run alternately, both
are slowed alike.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def wall_times(programs: Mapping[str, Sequence[str]], env: Mapping[str, Mapping[str, str]] | None = None,
               slice_s: float = 4.0) -> dict[str, float]:  # fmt: skip
    """Wall-clock seconds of each program, without the time in which it was stopped.

    A program that fails ends all of them: `RuntimeError` with the end of what it said.

    Args:
        programs: Name -> command.
        env: Name -> more environment.
        slice_s: Seconds of a turn.
    """
    spent = dict.fromkeys(programs, 0.0)
    running: dict[str, subprocess.Popen[bytes]] = {}
    left = list(programs)
    with tempfile.TemporaryDirectory(prefix="fine_dist-turns-") as folder:
        logs = {name: Path(folder) / str(i) for i, name in enumerate(programs)}
        try:
            while left:
                for name in list(left):
                    begun = time.perf_counter()
                    if name in running:
                        _tell(running[name].pid, signal.SIGCONT)
                    else:
                        more = {**os.environ, **(env or {}).get(name, {})}
                        # Into a file: a pipe that nobody reads while its
                        # program is stopped would fill and block it for ever.
                        with open(logs[name], "wb") as log:
                            running[name] = subprocess.Popen(programs[name], env=more, stdout=log, stderr=log)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        running[name].wait(slice_s)
                    spent[name] += time.perf_counter() - begun
                    if running[name].returncode is None:
                        # The whole family, because a program's workers would otherwise go on in the other's turn.
                        _tell(running[name].pid, signal.SIGSTOP)
                        continue
                    left.remove(name)
                    if running[name].returncode:
                        words = logs[name].read_text(errors="replace").strip().splitlines()[-5:]
                        raise RuntimeError(f"{name} ended with {running[name].returncode}:\n  " + "\n  ".join(words))
        finally:
            for name in left:
                if name in running:
                    _tell(running[name].pid, signal.SIGKILL)
                    running[name].wait()
    return spent


def _tell(pid: int, what: signal.Signals) -> None:
    """Send a signal to a process and all that it has started, once each, until no new one has appeared."""
    told: set[int] = set()
    # A process may fork between the listing and the signal, so the family is listed again until nobody is new.
    while new := _family(pid) - told:
        for member in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, what)
        told |= new


def _family(pid: int) -> set[int]:
    """A process and its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended since
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    family, generation = {pid}, {pid}
    while generation:
        generation = {child for child, parent in parents.items() if parent in generation} - family
        family |= generation
    return family
