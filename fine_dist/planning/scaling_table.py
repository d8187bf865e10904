"""Predictions of scaling as a table, as a curve in the terminal, and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from fine_dist.core.errors import ConfigError
from fine_dist.core.files import atomic_file
from fine_dist.core.limits import GIB
from fine_dist.planning.scaling_model import Prediction

Series = Mapping[str, Sequence[Prediction]]
"""Predictions by label, in the order of the numbers of processes."""
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HEIGHT, STEP = 11, 7
"""Lines of the curve in the terminal, and characters between two numbers of processes."""


def lines(series: Series) -> list[str]:
    """The table: one block for each number of processes, with one line for each label."""
    width = max(map(len, series))
    head = f"{'processes':>9}  {'':{width}}  {'batch':>6}  {'step ms':>9}  {'compute':>9}  {'communication':>13}  "
    table = [head + f"{'hidden':>7}  {'sent MB':>8}  {'GiB':>7}  {'images/s':>9}  efficiency"]
    for i in range(len(next(iter(series.values())))):
        for label, predictions in series.items():
            p = predictions[i]
            table.append(
                f"{p.processes:9,}  {label:{width}}  {p.batch:6,}  {1e3 * p.step_s:9,.1f}  "
                f"{1e3 * p.compute_s:9,.1f}  {1e3 * p.communication_s:13,.2f}  {1e3 * p.hidden_s:7,.2f}  "
                f"{p.sent_bytes / 1e6:8,.1f}  {p.memory_bytes / GIB:7,.2f}  {p.images_per_s:9,.1f}  {p.efficiency:9.1%}"
            )
        table.append("")
    return table[:-1]


def curve(series: Series) -> list[str]:
    """Efficiency over processes as letters; where labels coincide, the first of the legend is shown."""
    counts = [p.processes for p in next(iter(series.values()))]
    grid = [[" "] * (STEP * len(counts)) for _ in range(HEIGHT)]
    for mark, predictions in reversed(list(zip(MARKS, series.values()))):
        for i, p in enumerate(predictions):
            row = round((HEIGHT - 1) * (1 - min(1.0, max(0.0, p.efficiency))))
            grid[row][STEP * i + STEP // 2] = mark
    lines = ["efficiency"]
    for row, cells in enumerate(grid):
        lines.append(f"{1 - row / (HEIGHT - 1):5.0%} |{''.join(cells).rstrip()}")
    lines += ["      +" + "-" * STEP * len(counts), "       " + "".join(f"{count:^{STEP},}" for count in counts)]
    lines.append("processes; " + ", ".join(f"{mark} {label}" for mark, label in zip(MARKS, series)))
    return lines


def check_figure_path(path: str | Path) -> Path:
    """Raise `ConfigError` unless the path ends in one of `FIGURE_SUFFIXES`; returns it."""
    if Path(path).suffix.lower() not in FIGURE_SUFFIXES:
        raise ConfigError(f"--out {path}: the name of a figure ends in one of {', '.join(FIGURE_SUFFIXES)}")
    return Path(path)


def draw(series: Series, path: str | Path, title: str) -> Path:
    """Draw efficiency and the time that communication adds to a step over processes; returns the path."""
    path = check_figure_path(path)
    colors = ("#0b7285", "#e8590c", "#7048e8", "#5c940d", "#a61e4d", "#1864ab", "#b08900", "#868e96")
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(10.4, 4.0), layout="constrained")  # not pyplot, which would look for a display
        FigureCanvasAgg(figure)
        efficiency, added = figure.subplots(1, 2)
        for i, (label, predictions) in enumerate(series.items()):
            style = {"color": colors[i % len(colors)], "marker": "o", "ms": 4, "lw": 1.6, "label": label}
            style["linestyle"] = ("-", "--", "-.", ":")[i % 4]  # because lines often coincide
            counts = [p.processes for p in predictions]
            efficiency.plot(counts, [p.efficiency for p in predictions], **style)
            waits_ms = [max(1e3 * (p.communication_s - p.hidden_s), 1e-3) for p in predictions]
            added.plot(counts, waits_ms, **style)
        for axis, name in ((efficiency, "efficiency"), (added, "communication that a step waits for, ms")):
            axis.set_xscale("log", base=2)
            axis.set_xlabel("processes")
            axis.set_title(name)
            axis.xaxis.set_major_locator(FixedLocator(counts))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.grid(axis="y")
        efficiency.set_ylim(0, 1.05 * max(1.0, *(p.efficiency for predictions in series.values() for p in predictions)))
        efficiency.yaxis.set_major_formatter(PercentFormatter(1.0))
        if all(math.isfinite(p.communication_s) for predictions in series.values() for p in predictions):
            added.set_yscale("log")
        figure.suptitle(title, x=0.02, ha="left")
        added.legend(fontsize=8.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, path.suffix) as draft:
            figure.savefig(draft, dpi=140)
    return path
