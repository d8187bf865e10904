"""A measured figure with its target, and methods of measuring that are robust against other load on the machine."""

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
        bar: The target. None: there is none.
        better: Whether the target is a minimum (`higher`) or a maximum (`lower`); `near`: between 2 - bar and bar.
        share: Percent of a total, if the figure is a part of one.
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
    """Report on stderr what is being measured; the table is printed at the end."""
    print(f"measuring {what} ...", file=sys.stderr, flush=True)


def seconds(body: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Measure several variants alternately, so that a slow period of the machine affects all of them.

    Args:
        variants: Functions that run once and return a figure (such as `lambda: seconds(step)`), by name.
        rounds: Number of figures for each variant.
        warmup: Number of rounds before these, whose figures are discarded.

    Returns:
        The figures of each variant by round, by name.
    """
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        # The order is reversed in every other round, so that no variant always follows the same one.
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            figure = variants[name]()
            if turn >= warmup:
                figures[name].append(figure)
    return figures


def median_of_ratios(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of over[i] / under[i], which are measured in the same round and so under similar load."""
    return statistics.median(a / b for a, b in zip(over, under))


def median(figures: Sequence[float]) -> float:
    """The median, as a float."""
    return float(statistics.median(figures))
