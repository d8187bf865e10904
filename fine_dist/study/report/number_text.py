"""Numbers and settings as the text of tables, figures and sentences."""

from __future__ import annotations

import math

from fine_dist.study.report.measurements import Mean


def mean_text(mean: Mean) -> str:
    """`0.1105 ± 0.0004`; without a spread for one seed."""
    return number(mean.mean) + (f" ± {number(mean.spread, like=mean.mean)}" if mean.num > 1 else "")


def number(value: float, like: float | None = None) -> str:
    """Text with four decimals below 1, else four significant digits; `like`: as many decimals as that number gets."""
    size = abs(value if like is None else like)
    return f"{value:.4f}" if size < 1 else f"{value:.{max(0, 3 - int(math.log10(size)))}f}"


def short(value: float) -> str:
    """`134 K`, `1.2 G`, `3.1 T`: at most three significant digits and a unit."""
    for size, unit in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def ratio(value: float) -> str:
    """`3`, `2.5`, `0.33`."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def plain(value: object) -> str:
    """A setting's value as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
