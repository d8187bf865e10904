"""Predictions of scale as a table, as a curve in the terminal, and as a picture."""

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
"""Predictions by label, each in the order of its processes."""
PICTURES = (".png", ".svg", ".pdf")
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HEIGHT, STEP = 11, 7
"""Lines of a terminal's curve, and characters from one number of processes to the next."""


def lines(series: Series) -> list[str]:
    """A table: a block for each number of processes, a line for each label."""
    width = max(map(len, series))
    head = f"{'processes':>9}  {'':{width}}  {'batch':>6}  {'step ms':>9}  {'compute':>9}  {'communication':>13}  "
    found = [head + f"{'hidden':>7}  {'sent MB':>8}  {'GiB':>7}  {'images/s':>9}  efficiency"]
    for place in range(len(next(iter(series.values())))):
        for label, made in series.items():
            p = made[place]
            found.append(
                f"{p.processes:9,}  {label:{width}}  {p.batch:6,}  {1e3 * p.step_s:9,.1f}  "
                f"{1e3 * p.compute_s:9,.1f}  {1e3 * p.communication_s:13,.2f}  {1e3 * p.hidden_s:7,.2f}  "
                f"{p.sent_bytes / 1e6:8,.1f}  {p.memory_bytes / GIB:7,.2f}  {p.images_per_s:9,.1f}  {p.efficiency:9.1%}"
            )
        found.append("")
    return found[:-1]


def curve(series: Series) -> list[str]:
    """Efficiency against processes, drawn with letters; where several meet, the first of the key stands."""
    counts = [p.processes for p in next(iter(series.values()))]
    grid = [[" "] * (STEP * len(counts)) for _ in range(HEIGHT)]
    for mark, made in reversed(list(zip(MARKS, series.values()))):
        for place, p in enumerate(made):
            row = round((HEIGHT - 1) * (1 - min(1.0, max(0.0, p.efficiency))))
            grid[row][STEP * place + STEP // 2] = mark
    found = ["efficiency"]
    for row, cells in enumerate(grid):
        found.append(f"{1 - row / (HEIGHT - 1):5.0%} |{''.join(cells).rstrip()}")
    found += ["      +" + "-" * STEP * len(counts), "       " + "".join(f"{count:^{STEP},}" for count in counts)]
    found.append("processes; " + ", ".join(f"{mark} {label}" for mark, label in zip(MARKS, series)))
    return found


def check_picture(path: str | Path) -> Path:
    """`ConfigError` for a name whose ending is no picture's."""
    if Path(path).suffix.lower() not in PICTURES:
        raise ConfigError(f"--out {path}: a picture's name ends in one of {', '.join(PICTURES)}")
    return Path(path)


def draw(series: Series, path: str | Path, title: str) -> Path:
    """Efficiency, and the time that communication adds to a step, against processes; where it was written."""
    path = check_picture(path)
    shades = ("#0b7285", "#e8590c", "#7048e8", "#5c940d", "#a61e4d", "#1864ab", "#b08900", "#868e96")
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(10.4, 4.0), layout="constrained")  # without pyplot, which would look for a display
        FigureCanvasAgg(figure)
        efficiency, added = figure.subplots(1, 2)
        for i, (label, made) in enumerate(series.items()):
            look = {"color": shades[i % len(shades)], "marker": "o", "ms": 4, "lw": 1.6, "label": label}
            look["linestyle"] = ("-", "--", "-.", ":")[i % 4]  # lines often lie on each other
            counts = [p.processes for p in made]
            efficiency.plot(counts, [p.efficiency for p in made], **look)
            shown = [max(1e3 * (p.communication_s - p.hidden_s), 1e-3) for p in made]
            added.plot(counts, shown, **look)
        for axis, name in ((efficiency, "efficiency"), (added, "communication that a step waits for, ms")):
            axis.set_xscale("log", base=2)
            axis.set_xlabel("processes")
            axis.set_title(name)
            axis.xaxis.set_major_locator(FixedLocator(counts))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.grid(axis="y")
        efficiency.set_ylim(0, 1.05 * max(1.0, *(p.efficiency for made in series.values() for p in made)))
        efficiency.yaxis.set_major_formatter(PercentFormatter(1.0))
        if all(math.isfinite(p.communication_s) for made in series.values() for p in made):
            added.set_yscale("log")
        figure.suptitle(title, x=0.02, ha="left")
        added.legend(fontsize=8.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, path.suffix) as draft:
            figure.savefig(draft, dpi=140)
    return path
