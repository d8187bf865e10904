"""Requests to stop or to save from outside: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C, a time limit, a STOP file."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Protocol

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
FILES_EVERY_S = 1.0
"""Seconds between two looks of rank 0 for the files STOP and SAVE: a network file system is not asked at every step."""

GO_ON, SAVE, STOP = 0, 1, 2


class RequestFiles(Protocol):
    """A folder in which a user may leave a file STOP or SAVE (`fine_dist.engine.run_dir.RunDir`)."""

    def take_request(self, name: str) -> bool:
        """Whether the file is there; it is taken away."""


class Stopper:
    """A context that collects requests of this rank. The loop obeys the strongest request of all ranks.

    A signal is caught on any rank and only leaves a note, so the step that is under way is always finished. Ctrl-C is
    one of the signals; pressed a second time it ends the process at once.

    Args:
        files: Where a user may leave STOP or SAVE.
        time_limit_min: Minutes after which to stop; None: never.
        is_main: Whether this is rank 0, which alone looks for files.
    """

    def __init__(self, files: RequestFiles, time_limit_min: float | None, is_main: bool) -> None:
        self.files, self.is_main = files, is_main
        self.reason = "asked to stop by another rank"
        self._deadline = time.monotonic() + time_limit_min * 60 if time_limit_min else None
        self._limit_min = time_limit_min
        self._signal: int | None = None
        self._next_look: dict[str, float] = {}
        self._stop_file = False
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        # Python delivers signals to the main thread only. In a Ray worker that thread is Ray's, which has handlers of
        # its own.
        if threading.current_thread() is threading.main_thread():
            # Those of before are put back at the end: a launcher or a notebook may have its own.
            self._handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt  # pressed again: end now, without saving
        # Nothing else is done in a handler: it may interrupt any line, a write or a collective included.
        self._signal = number

    def stop_request(self, seconds_needed: float = 0.0) -> int:
        """What this rank asks for now: GO_ON, SAVE or STOP.

        Args:
            seconds_needed: What one more step and a save take; both must end before the time limit.
        """
        if self.must_stop(seconds_needed):
            return STOP
        return SAVE if self._finds("SAVE") else GO_ON

    def must_stop(self, seconds_needed: float = 0.0) -> bool:
        """Whether this rank asks to stop now; a request to save is left for the loop to find."""
        if self._signal is not None:
            self.reason = f"received {signal.Signals(self._signal).name}"
        # The time that one more step and a save take is subtracted: a scheduler kills at its limit without asking.
        elif self._deadline is not None and time.monotonic() + seconds_needed >= self._deadline:
            self.reason = f"the time limit of {self._limit_min:g} min is reached"
        elif self._stop_file or self._finds("STOP"):
            # Remembered, because the file is taken away by the first
            # look, and the request must still stand at the next one.
            self._stop_file = True
            self.reason = "a file STOP was in the run directory"
        else:
            return False
        return True

    def _finds(self, name: str) -> bool:
        """Whether rank 0 finds a file of this name; each is looked for once in `FILES_EVERY_S`."""
        now = time.monotonic()
        # Rank 0 alone looks: hundreds of ranks that ask for one file every second are a load on a metadata server.
        if not self.is_main or now < self._next_look.get(name, 0.0):
            return False
        self._next_look[name] = now + FILES_EVERY_S
        return self.files.take_request(name)


class Budget:
    """Time that something beside training may take, such as drawing previews: it ends early when a stop is asked for.

    Args:
        stopper: Who may ask for a stop.
        seconds: Wall-clock seconds from now.
    """

    def __init__(self, stopper: Stopper, seconds: float) -> None:
        self.stopper, self.seconds = stopper, seconds
        self._end = time.monotonic() + seconds

    def used_up(self) -> str:
        """Why to end now; an empty string while there is time."""
        if self.stopper.must_stop():
            return self.stopper.reason
        return f"it took more than {self.seconds:.0f} s" if time.monotonic() > self._end else ""
