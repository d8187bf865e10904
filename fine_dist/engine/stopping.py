"""Requests to stop or to save from outside: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, a time limit, a STOP file."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Protocol

from fine_dist.core.processes import restore_handlers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
FILES_EVERY_S = 1.0
"""Seconds between two checks of rank 0 for the files STOP and SAVE, which limits the load on a network file system."""

GO_ON, SAVE, STOP = 0, 1, 2


class RequestFiles(Protocol):
    """A folder in which a user may create a file STOP or SAVE (`fine_dist.engine.run_dir.RunDir`)."""

    def take_request(self, name: str) -> bool:
        """Whether the file exists; it is then removed or renamed."""


class Stopper:
    """A context that collects the requests of this rank. The loop follows the strongest request of all ranks.

    A signal handler only sets a flag, so that the current step is always finished. Ctrl-C is one of the signals; a
    second one ends the process at once.

    Args:
        files: Folder in which a user may create STOP or SAVE.
        time_limit_min: Minutes after which to stop. None: no limit.
        is_main: Whether this is rank 0, the only rank that checks for files.
    """

    def __init__(self, files: RequestFiles, time_limit_min: float | None, is_main: bool) -> None:
        self.files, self.is_main = files, is_main
        self.reason = "asked to stop by another rank"
        self._deadline = time.monotonic() + time_limit_min * 60 if time_limit_min else None
        self._limit_min = time_limit_min
        self._signal: int | None = None
        self._next_look: dict[str, float] = {}
        self._stop_file = False
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopper:
        # Python allows signal handlers only in the main thread, which in a Ray worker is Ray's and has its own
        # handlers.
        if threading.current_thread() is threading.main_thread():
            # The previous handlers are restored on exit, because a launcher or a notebook may have its own.
            self._handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        restore_handlers(self._handlers_before, self._signal is not None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt  # the second Ctrl-C ends the process without saving
        # The handler does nothing else, because it may interrupt any line, such as a write or a collective.
        self._signal = number

    def stop_request(self, seconds_needed: float = 0.0) -> int:
        """The current request of this rank: GO_ON, SAVE or STOP.

        Args:
            seconds_needed: Duration of one more step and a save, which must end before the time limit.
        """
        if self.must_stop(seconds_needed):
            return STOP
        return SAVE if self._finds("SAVE") else GO_ON

    def must_stop(self, seconds_needed: float = 0.0) -> bool:
        """Whether this rank requests a stop. A request to save stays pending for the loop."""
        if self._signal is not None:
            self.reason = f"received {signal.Signals(self._signal).name}"
        # The time of one more step and a save is subtracted, because a scheduler kills the job at its limit.
        elif self._deadline is not None and time.monotonic() + seconds_needed >= self._deadline:
            self.reason = f"the time limit of {self._limit_min:g} min is reached"
        elif self._stop_file or self._finds("STOP"):
            # Remembered, because the first check removes the file
            # and the request must still hold at the next check.
            self._stop_file = True
            self.reason = "a file STOP was in the run directory"
        else:
            return False
        return True

    def _finds(self, name: str) -> bool:
        """Whether rank 0 finds a file of this name, which it checks once in `FILES_EVERY_S` seconds."""
        now = time.monotonic()
        # Only rank 0 checks: hundreds of ranks would load the metadata server of a shared file system.
        if not self.is_main or now < self._next_look.get(name, 0.0):
            return False
        self._next_look[name] = now + FILES_EVERY_S
        return self.files.take_request(name)


class Budget:
    """A time limit of work besides training, such as previews; the work also ends when a stop is requested.

    Args:
        stopper: Collects requests to stop.
        seconds: Wall-clock seconds from now.
    """

    def __init__(self, stopper: Stopper, seconds: float) -> None:
        self.stopper, self.seconds = stopper, seconds
        self._end = time.monotonic() + seconds

    def used_up(self) -> str:
        """Why the work must end; an empty string while it may continue."""
        if self.stopper.must_stop():
            return self.stopper.reason
        return f"it took more than {self.seconds:.0f} s" if time.monotonic() > self._end else ""
