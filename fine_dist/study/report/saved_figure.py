"""The figure of what each start is worth: steps of training from scratch that it saves, by training length."""

from __future__ import annotations

from typing import Any

import numpy as np

from fine_dist.study.report.canvas import FAINT, INK, Mark, color_of, figure_of, svg_of, tag
from fine_dist.study.report.results import Results
from fine_dist.study.report.worth import SavedSteps, saved_steps


def saved_lengths(results: Results) -> list[int]:
    """Training lengths for which it is known what some series saves."""
    return sorted({length for line in saved_steps(results) for length in line.saved})


def saved_height(results: Results) -> float:
    """Height in inches that the panels need."""
    return 1.0 + 0.3 * len({line.series for line in saved_steps(results)})


def saved_svg(results: Results) -> str | None:
    """Steps of scratch that each start saves, one panel per training length; None where none is known."""
    lengths = saved_lengths(results)
    if not lengths:
        return None
    with figure_of(len(lengths), max(3.4, 9.4 / len(lengths)), saved_height(results)) as (figure, axes):
        marks = saved_panels(axes, results)
        return svg_of(figure, "saved", "Steps of training from scratch that each start saves", marks)


def saved_panels(axes: list[Any], results: Results) -> list[Mark]:
    """Draw a bar for the mean over depths of what a series saves, and a dot for each depth.

    A number with `>` is a lower bound: at some depth scratch never reached the loss in the steps it had.
    """
    lines, lengths, marks = saved_steps(results), saved_lengths(results), []
    by_series: dict[str, list[SavedSteps]] = {}
    for line in lines:
        by_series.setdefault(line.series, []).append(line)
    order = sorted(by_series, key=lambda series: -_mean(by_series[series], lengths[-1]))
    for axis, length in zip(axes, lengths):
        for y, series in enumerate(order):
            known = [line for line in by_series[series] if length in line.saved]
            if not known:
                continue
            index, color = results.series.index(series), color_of(series, results)
            steps = [line.saved[length].steps for line in known]
            mean, bound = float(np.mean(steps)), any(line.saved[length].at_least for line in known)
            tag(axis.barh(y, mean, height=0.62, color=color, alpha=0.75)[0], index)
            tag(axis.plot(steps, [y] * len(steps), "o", ms=3.6, color=INK, mfc="white", mew=0.9, lw=0)[0], index)
            text = f"{'> ' if bound else ''}{mean:,.0f}".replace("-", "−")
            axis.annotate(text, (max([0.0, mean, *steps]), y), (6, 0), textcoords="offset points", va="center", size=9)
            name = f"{results.name_of(series)}, after {length:,} steps"
            marks += [
                Mark(axis, line.saved[length].steps, y, index, f"{name}, {line.target} layers: {line.text(length)}")
                for line in known
            ]
        axis.axvline(0, color=FAINT, lw=1)
        axis.set_title(f"after {length:,} steps")
        axis.set_yticks(range(len(order)), [results.name_of(s) for s in order] if axis is axes[0] else [], color=INK)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(order) - 0.4, -0.6)
        left, right = axis.get_xlim()
        axis.set_xlim(left, right + 0.24 * (right - left))  # room for the numbers
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace("-", "−"))
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x")
        axis.set_xlabel(f"steps of {results.name_of(results.baseline)} saved")
    return marks


def _mean(lines: list[SavedSteps], length: int) -> float:
    known = [line.saved[length].steps for line in lines if length in line.saved]
    return float(np.mean(known)) if known else float("-inf")
