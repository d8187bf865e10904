"""How far an encoding is, its rate and the time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

EVERY_S = 60.0
"""Seconds between two lines in a log."""


class Progress:
    """Images encoded by all processes that share a folder, as this one sees them.

    total: images in all; None where only the number of shards is known, which are then counted instead.
    """

    def __init__(self, folder: Path, total: int | None, units: int) -> None:
        self._folder, self._units = folder, units
        self.total = units if total is None else total
        self.unit = " shards" if total is None else " images"
        self._a_unit = self.total / max(1, units)
        self._started: float | None = None
        self._first, self._said = 0.0, time.monotonic()
        self._bar = tqdm(
            total=self.total, unit=self.unit, desc=f"encode {folder}", disable=not sys.stderr.isatty(), smoothing=0.1
        )

    def show(self, done_units: int, within: int) -> None:
        """done_units: units that anybody has done. within: images of the one that this process is at."""
        count = min(self.total, round(done_units * self._a_unit) + (within if self.unit == " images" else 0))
        if self._started is None:  # what was there before this process began took none of its time
            self._started, self._first = time.monotonic(), count
            self._bar.initial = count
            self._bar.start_t = time.time()
        self._bar.n = max(self._bar.n, count)
        self._bar.update(0)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= EVERY_S:
            self._said = now
            print(self.line(count, now - self._started), flush=True)

    def line(self, count: int, seconds: float) -> str:
        """What a log says: how many of how many, rate, time left."""
        rate = (count - self._first) / max(seconds, 1e-9)
        left = tqdm.format_interval((self.total - count) / rate) if rate else "unknown"
        return f"encode: {self._folder}: {count:,} of {self.total:,}{self.unit}, {rate:.3g}/s, {left} left"

    def close(self) -> None:
        """Leave the terminal to others."""
        self._bar.refresh()
        self._bar.close()
