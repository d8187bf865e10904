"""Reasons to stop or save that come from outside: signals, a time limit, a file in the run directory."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Protocol

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
WORDS_EVERY_S = 1.0
"""Rank 0 looks for STOP and SAVE so often: a network file system is not asked at every step."""

GO_ON, SAVE, STOP = 0, 1, 2


class Words(Protocol):
    """Where somebody may leave a word (`fine_dist.engine.run_dir.RunDir`)."""

    def take_word(self, word: str) -> bool:
        """Whether STOP or SAVE was left there."""


class Stopper:
    """A context that collects wishes; `wish()` gives this rank's, and the loop takes the greatest over ranks.

    Signals are caught on any rank and do nothing but leave a note, so the step is always finished. Ctrl-C is one of
    them; a second one ends at once.
    """

    def __init__(self, run_dir: Words, time_limit_min: float | None, is_main: bool) -> None:
        self.run_dir, self.is_main = run_dir, is_main
        self.reason = "asked to stop by another rank"
        self._deadline = time.monotonic() + time_limit_min * 60 if time_limit_min else None
        self._limit_min = time_limit_min
        self._signal: int | None = None
        self._next_look = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        # Python handles signals in the main thread only; in a Ray worker Ray's own does.
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt  # pressed again: at once, without saving
        self._signal = number

    def wish(self, seconds_needed: float = 0.0) -> int:
        """GO_ON, SAVE or STOP. seconds_needed: one more step and a save must still fit before the time limit."""
        now = time.monotonic()
        if self._signal is not None:
            self.reason = f"received {signal.Signals(self._signal).name}"
            return STOP
        if self._deadline is not None and now + seconds_needed >= self._deadline:
            self.reason = f"the time limit of {self._limit_min:g} min is reached"
            return STOP
        if self.is_main and now >= self._next_look:
            self._next_look = now + WORDS_EVERY_S
            if self.run_dir.take_word("STOP"):
                self.reason = "a file STOP was in the run directory"
                return STOP
            if self.run_dir.take_word("SAVE"):
                return SAVE
        return GO_ON
