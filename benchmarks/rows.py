"""A measured figure with its target, and ways of measuring that other load on the machine disturbs least."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class BenchmarkRow:
    """One line of a benchmark.

    Attributes:
        measure: What was measured.
        value: The figure.
        unit: Its unit (`x` for a ratio).
        bar: The target; None for a figure without one.
        better: Which side of the target is good; `near`: a ratio no further from 1 than the target, on either side.
        share: Percent of the whole that the figure is a part of; None where it is not a part.
    """

    measure: str
    value: float
    unit: str
    bar: float | None = None
    better: Literal["higher", "lower", "near"] = "higher"
    share: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.bar is None:
            return None
        if self.better == "near":
            return abs(self.value - 1) <= self.bar - 1 + 1e-9
        return self.value >= self.bar if self.better == "higher" else self.value <= self.bar

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def say(what: str) -> None:
    """Report on stderr what is being measured; the table comes at the end."""
    print(f"measuring {what} ...", file=sys.stderr, flush=True)


def seconds(body: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Measure several variants in turn, `rounds` times each, so that a slow minute of the machine falls on all.

    Returns name -> its figures, in order: the i-th of each belong together.

    Args:
        variants: Name -> a function that runs once and returns its figure (such as `lambda: seconds(step)`).
        warmup: Rounds that are run first and not kept.
    """
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        # every other round in reverse order, so that no variant always follows the same other one
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            figure = variants[name]()
            if turn >= warmup:
                figures[name].append(figure)
    return figures


def median_of_ratios(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of over[i] / under[i]: figures measured next to each other share the load of the machine."""
    return statistics.median(a / b for a, b in zip(over, under))


def median(figures: Sequence[float]) -> float:
    """The median, as a float."""
    return float(statistics.median(figures))
