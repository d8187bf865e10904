"""Curves of the held-out loss: during training, and at the ends of runs of different lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fine_dist.study.report.canvas import FAINT, GRID, Mark, color_of, figure_of, marker_of, svg_of, tag
from fine_dist.study.report.measurements import Mean
from fine_dist.study.report.number_text import mean_text, ratio
from fine_dist.study.report.results import Results
from fine_dist.study.report.worth import end_curve

WIDEST = 8.2
"""Training curves are drawn up to this multiple of N; longer runs are in the figure of training lengths."""
_MIN_POINTS = 3
"""Number of points from which a series is drawn as a line; fewer are drawn as separate points."""


def draw(results: Results, axis: Any, series: str, points: Iterable[tuple[float, Mean]], where: str) -> list[Mark]:
    """Draw a series: a line with a band of one standard deviation, or points if there are few of them.

    Args:
        results: The results, for color, name and number of the series.
        axis: The axis.
        series: The series.
        points: x and the mean there, ascending.
        where: Format of the tooltip, with `x` and `mean`.
    """
    points = list(points)
    if not points:
        return []
    index, color = results.series.index(series), color_of(series, results)
    xs = [x for x, _ in points]
    means, spreads = (np.array([getattr(mean, key) for _, mean in points]) for key in ("mean", "spread"))
    strong = series in (results.main, results.baseline)
    line_style: dict[str, Any] = {"lw": 2.2 if strong else 1.4, "ms": 4.2, "marker": marker_of(series, results)}
    if len(points) < _MIN_POINTS:
        line_style |= {"lw": 0, "ms": 6}
    tag(axis.plot(xs, means, color=color, label=results.name_of(series), **line_style)[0], index)
    if spreads.any():
        if len(points) < _MIN_POINTS:
            _, _, bars = axis.errorbar(xs, means, yerr=spreads, color=color, lw=0, elinewidth=1.2)
            tag(bars[0], index)
        else:
            tag(axis.fill_between(xs, means - spreads, means + spreads, color=color, alpha=0.16, lw=0), index)
    name = results.name_of(series)
    texts = [where.format(x=f"{x:,.0f}", mean=mean_text(mean)) for x, mean in points]
    return [Mark(axis, x, mean.mean, index, f"{name}, {text}") for (x, mean), text in zip(points, texts)]


# --- during training -------------------------------------------------------------------------------------------------


def curves_svg(results: Results) -> str | None:
    """Held-out loss against training steps, one panel per depth; None where no target was measured twice."""
    targets = curve_targets(results)
    if not targets:
        return None
    with figure_of(len(targets), 3.9, 3.4) as (figure, axes):
        marks = curve_panels(axes, results, targets)
        return svg_of(figure, "curves", "Held-out loss against training steps, by depth", marks)


def curve_targets(results: Results) -> list[int]:
    """Depths at which some series was measured twice."""
    return [t for t in results.targets if any(len(results.points(s, t)) > 1 for s in results.series)]


def curve_panels(axes: list[Any], results: Results, targets: list[int]) -> list[Mark]:
    """Draw the curves of every series, one depth per axis."""
    top, bottom = _loss_range(results, targets)
    marks = []
    for axis, target in zip(axes, targets):
        for series in reversed(results.series):
            points = [(float(s), m) for s in results.points(series, target) if (m := results.mean(series, target, s))]
            marks += draw(results, axis, series, points, f"{target} layers, {{x}} steps: {{mean}}")
        _mark_budget(axis, results, target)
        axis.set_title(f"{target} layers")
        axis.set_ylim(bottom, top)
        right = min(axis.get_xlim()[1], WIDEST * (results.budget or 10**12))
        axis.set_xlim(-0.015 * right, right)
        axis.grid(axis="y")
        axis.set_xlabel("training steps after initialization")
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_ylabel("held-out loss")
    return [mark for mark in marks if mark.y < top and mark.x <= mark.axis.get_xlim()[1]]


def _mark_budget(axis: Any, results: Results, target: int) -> None:
    """Draw a dashed line at the main series' loss after N steps; its crossing with a curve shows the saved steps."""
    budget = results.budget
    ours = results.mean(results.main, target, budget) if budget else None
    if budget is None or ours is None:
        return
    axis.axhline(ours.mean, color=color_of(results.main, results), lw=1, ls=(0, (4, 3)), alpha=0.8)
    most = results.trained_steps(results.baseline, target)
    for at in sorted({budget, most} if budget < most <= WIDEST * budget else {budget}):
        axis.axvline(at, color=GRID, lw=1, zorder=0)
        name = "N" if at == budget else f"{ratio(at / budget)}N"
        axis.annotate(name, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points",
                      color=FAINT, size=8.5)  # fmt: skip


def _loss_range(results: Results, targets: list[int]) -> tuple[float, float]:
    """(top, bottom) of the loss axis: it shows the main series completely and the other series from N/3 on.

    An untrained model has a loss of about 1; an axis that includes it would hide all differences.
    """
    values, tops = [], []
    for target in targets:
        budget = results.budget or max(s for name in results.series for s in results.points(name, target) or [1])
        for series in results.series:
            points = results.points(series, target)
            values += [np.mean(v) for v in points.values()]
            started = series == results.main and results.init_steps(series, target) > 0
            tops += [np.mean(v) for s, v in points.items() if started or s >= budget / 3]
    low, high = min(values), max(tops or values)
    return high + 0.15 * (high - low) + 1e-9, low - 0.08 * (high - low) - 1e-9


# --- at the ends of runs ---------------------------------------------------------------------------------------------


def map_svg(results: Results) -> str | None:
    """Loss at the end of runs against their length, one panel per depth; None where no series has three lengths."""
    targets = map_targets(results)
    if not targets:
        return None
    with figure_of(len(targets), 3.9, 3.4) as (figure, axes):
        marks = map_panels(axes, results, targets)
        return svg_of(figure, "map", "Held-out loss against the length of training, by depth", marks)


def map_targets(results: Results) -> list[int]:
    """Depths at which some series was trained for three lengths or more."""
    lengths = {t: [len(end_curve(results, s, t).steps) for s in results.series] for t in results.targets}
    return [target for target, counts in lengths.items() if max(counts, default=0) >= _MIN_POINTS]


def map_panels(axes: list[Any], results: Results, targets: list[int]) -> list[Mark]:
    """Draw loss against length of training on logarithmic steps."""
    marks, lengths = (
        [],
        sorted({step for s in results.series for t in targets for step in end_curve(results, s, t).steps}),
    )
    for axis, target in zip(axes, targets):
        axis.set_xscale("log")
        for series in reversed([s for s in results.series if ":" not in s]):
            curve = end_curve(results, series, target)
            means = [results.mean(series, target, step) for step in curve.steps]
            points = [(float(step), mean) for step, mean in zip(curve.steps, means) if mean]
            marks += draw(results, axis, series, points, f"{target} layers, trained for {{x}} steps: {{mean}}")
        axis.set_title(f"{target} layers")
        axis.grid()
        axis.minorticks_off()
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])  # the lengths that were run, and no others
        axis.set_xlabel("training steps after initialization")
    axes[0].set_ylabel("held-out loss at the end")
    return marks
