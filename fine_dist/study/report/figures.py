"""The figures of a report's page: curves, bars, trade-offs of quality and cost, and scalers over depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fine_dist.study.report.canvas import (
    FAINT,
    GRID,
    INK,
    Mark,
    color_of,
    figure_of,
    key_below,
    marker_of,
    svg_of,
    tag,
)  # fmt: skip
from fine_dist.study.report.claims import linearity
from fine_dist.study.report.results import Mean, Results, number, ratio, short
from fine_dist.study.report.saved_figure import saved_svg
from fine_dist.study.report.tables import storage_of
from fine_dist.study.report.worth import MODELS, break_even, end_curve

WIDEST = 8.2
"""Training curves are drawn up to so many times N; a longer run is in the figure of lengths."""
_LONG = 3
"""Points from which a series is drawn as a line; fewer are drawn as points."""


def draw(results: Results, axis: Any, series: str, points: Iterable[tuple[float, Mean]], where: str) -> list[Mark]:
    """A series on an axis: a line with a band of one standard deviation, or points where there are few of them.

    Args:
        results: The results, for color, name and number of the series.
        axis: The axis.
        series: The series.
        points: x and the mean there, ascending.
        where: Format of the text under the mouse, with `x` and `mean`.
    """
    points = list(points)
    if not points:
        return []
    index, color = results.series.index(series), color_of(series, results)
    xs = [x for x, _ in points]
    means, spreads = (np.array([getattr(mean, key) for _, mean in points]) for key in ("mean", "spread"))
    strong = series in (results.main, results.baseline)
    look: dict[str, Any] = {"lw": 2.2 if strong else 1.4, "ms": 4.2, "marker": marker_of(series, results)}
    if len(points) < _LONG:
        look |= {"lw": 0, "ms": 6}
    tag(axis.plot(xs, means, color=color, label=results.name_of(series), **look)[0], index)
    if spreads.any():
        if len(points) < _LONG:
            _, _, bars = axis.errorbar(xs, means, yerr=spreads, color=color, lw=0, elinewidth=1.2)
            tag(bars[0], index)
        else:
            tag(axis.fill_between(xs, means - spreads, means + spreads, color=color, alpha=0.16, lw=0), index)
    name = results.name_of(series)
    texts = [where.format(x=f"{x:,.0f}", mean=_with_spread(mean)) for x, mean in points]
    return [Mark(axis, x, mean.mean, index, f"{name}, {text}") for (x, mean), text in zip(points, texts)]


def _with_spread(mean: Mean) -> str:
    return number(mean.mean) + (f" ± {number(mean.spread, like=mean.mean)}" if mean.num > 1 else "")


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
    """A dashed level at the main series' loss after N steps: where another curve crosses it is what is saved."""
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
    """(top, bottom) of the loss axis: down to the least value, up to all of the main series and of others from N/3 on.

    An untrained model predicts no noise at all (a loss of 1); a scale that shows that hides all differences.
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
    targets = _map_targets(results)
    if not targets:
        return None
    with figure_of(len(targets), 3.9, 3.4) as (figure, axes):
        marks = map_panels(axes, results, targets)
        return svg_of(figure, "map", "Held-out loss against the length of training, by depth", marks)


def _map_targets(results: Results) -> list[int]:
    return [t for t in results.targets if any(len(end_curve(results, s, t).steps) >= _LONG for s in results.series)]


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


def break_even_svg(results: Results) -> str | None:
    """Total FLOPs for n models against n, with every stage paid for and with a free ancestor."""
    found = break_even(results)
    if found is None:
        return None
    panels = 2 if any(line.free for line in found.lines) else 1
    with figure_of(panels, 4.9, 3.4) as (figure, axes):
        marks = break_even_panels(axes, results)
        return svg_of(figure, "break-even", "Total FLOPs for n models against n", marks)


def break_even_panels(axes: list[Any], results: Results) -> list[Mark]:
    """Draw total FLOPs for n = 1..100 models: every stage paid for, and (second axis) with free ancestors."""
    found, marks = break_even(results), []
    counts = np.unique(np.logspace(0, np.log10(MODELS), 40).round().astype(int))
    for axis, free in zip(axes, (False, True)):
        with_free = {line.series for line in found.lines if line.free} if found else set()
        for line in reversed(found.lines if found else []):
            if line.free != (free and line.series in with_free):
                continue
            index = results.series.index(line.series)
            totals = [line.total(int(n)) for n in counts]
            style = {"color": color_of(line.series, results), "label": results.name_of(line.series),
                     "marker": marker_of(line.series, results), "markevery": 6, "ms": 4.2}  # fmt: skip
            tag(axis.plot(counts, totals, lw=2.2 if line.series == results.main else 1.5, **style)[0], index)
            name = results.name_of(line.series)
            for n in (1, 3, 10, 30, 100):
                text = f"{name}, {n} models: {short(line.total(n))}FLOPs ({line.steps:,.0f} training steps each)"
                marks.append(Mark(axis, n, line.total(n), index, text))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.yaxis.set_major_formatter(lambda value, _: short(value))
        axis.grid()
        axis.set_xlabel("models made")
        axis.set_title("free public ancestor" if free else "every stage paid for")
    quality = f"\nto reach {results.name_of(results.baseline)} after {found.steps:,} steps" if found else ""
    axes[0].set_ylabel(f"total FLOPs{quality}")
    return marks


def depths_svg(results: Results) -> str | None:
    """Held-out loss after N steps against depth; None for fewer than two depths or without N."""
    n = results.budget
    lines = {s: {t: m for t in results.targets if n and (m := results.mean(s, t, n))} for s in results.series}
    if len({t for points in lines.values() for t in points}) < 2:
        return None
    with figure_of(1, 9.4, 3.2) as (figure, [axis]):
        marks: list[Mark] = []
        for series, points in reversed(lines.items()):
            items = [(float(t), mean) for t, mean in points.items()]
            marks += draw(results, axis, series, items, f"{{x}} layers, {n:,} steps: {{mean}}")
        axis.set_xticks(results.targets)
        axis.set_xlabel("layers")
        axis.set_ylabel(f"held-out loss after {n:,} steps")
        axis.grid(axis="y")
        return svg_of(figure, "depths", "Held-out loss after N steps against depth", marks)


def costs_svg(results: Results) -> str | None:
    """Held-out loss against all FLOPs spent, one panel per depth; None when fewer than two series have costs."""
    costed = [m for m in results.measurements if m.stage == "train" and m.flops + m.flops_condense > 0 and m.step]
    targets = sorted({m.target for m in costed})
    if len({m.series for m in costed}) < 2:
        return None
    with figure_of(len(targets), 3.9, 3.4) as (figure, axes):
        marks: list[Mark] = []
        for axis, target in zip(axes, targets):
            for series in reversed(results.series):
                spent = {m.flops + m.flops_condense: m.step for m in costed if (m.series, m.target) == (series, target)}
                points = [(x, mean) for x in sorted(spent) if (mean := results.mean(series, target, spent[x]))]
                marks += draw(results, axis, series, points, f"{target} layers, {{x}} FLOPs: {{mean}}")
            axis.set_xscale("log", subs=[2, 5])
            axis.xaxis.set_major_formatter(lambda value, _: short(value))
            axis.xaxis.set_minor_formatter(lambda value, _: short(value))
            axis.set_title(f"{target} layers")
            axis.grid(axis="y")
            axis.set_xlabel("FLOPs spent in all")
        axes[0].set_ylabel("held-out loss")
        return svg_of(figure, "costs", "Held-out loss against FLOPs spent in all stages, by depth", marks)


def storage_svg(results: Results) -> str | None:
    """Numbers stored against the number of initialized targets; None when no series shares anything."""
    found = storage_of(results)
    if len(found) < 2:
        return None
    counts = np.arange(0, 11)
    with figure_of(1, 9.4, 3.0) as (figure, [axis]):
        axis.plot(counts, counts * found[0].own, color=FAINT, lw=1.4, ls=(0, (4, 3)))
        axis.annotate("dense models", (counts[-3], counts[-3] * found[0].own), (8, -6), textcoords="offset points",
                      ha="left", va="top", color=FAINT, size=9)  # fmt: skip
        marks = []
        for kept in found[1:]:
            index, color = results.series.index(kept.series), color_of(kept.series, results)
            totals = [kept.total(int(n)) for n in counts]
            tag(axis.plot(counts, totals, color=color, lw=2 if kept.series == results.main else 1.2)[0], index)
            marks += [Mark(axis, float(n), t, index, f"{kept.label}, {n} models: {t:,} numbers") for n, t in
                      zip(counts, totals)]  # fmt: skip
        axis.yaxis.set_major_formatter(lambda value, _: short(value))
        axis.set_xlabel(f"targets of {max(results.target_params)} layers")
        axis.set_ylabel("numbers stored")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
        return svg_of(figure, "storage", "Numbers stored against the number of targets", marks)


def bars_svg(results: Results) -> str | None:
    """Fréchet distances at the ends of runs, bars by series, one group per depth; None when none was measured."""
    groups = {target: _bars(results, target) for target in results.targets}
    groups = {target: bars for target, bars in groups.items() if bars}
    if not groups:
        return None
    with figure_of(1, 9.4, 0.9 + 0.31 * sum(len(b) + 1.1 for b in groups.values())) as (figure, [axis]):
        y, ticks, marks = 0.0, [], []
        for target, bars in groups.items():
            axis.text(0, y - 0.72, f"{target} layers", weight="bold", size=10, va="center")
            for series, name, mean, at_budget in bars:
                index, color = results.series.index(series), color_of(series, results)
                [bar] = axis.barh(y, mean.mean, height=0.74, color=color, alpha=1 if at_budget else 0.45)
                tag(bar, index)
                if mean.num > 1:
                    axis.errorbar(mean.mean, y, xerr=mean.spread, color=INK, lw=1, capsize=2.5)
                axis.annotate(number(mean.mean), (mean.mean + mean.spread, y), (6, 0), textcoords="offset points",
                              va="center", size=9)  # fmt: skip
                marks.append(Mark(axis, mean.mean, y, index, f"{name}, {target} layers: {_with_spread(mean)}"))
                ticks.append((y, name))
                y += 1
            y += 1.1
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], color=INK)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x")
        axis.set_ylim(y - 0.9, -1.2)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.08)
        axis.set_xlabel("Fréchet distance (lower is better)")
        if results.fd_floor is not None:
            axis.axvline(results.fd_floor, color=INK, lw=1, ls=(0, (4, 3)))
            axis.annotate("held-out real images", (results.fd_floor, y - 0.9), (4, 3), textcoords="offset points",
                          size=8.5, va="bottom")  # fmt: skip
        return svg_of(figure, "bars", "Fréchet distance of samples, by method and depth", marks)


def _bars(results: Results, target: int) -> list[tuple[str, str, Mean, bool]]:
    """(series, its name and steps, mean, whether that is after N steps) of every distance after N steps or more."""
    n = results.budget
    trained = [m for m in results.measurements if n and m.step >= n and m.target == target and m.stage == "train"]
    found = []
    for series in results.series:
        for step in sorted({m.step for m in trained}):
            mean = results.mean(series, target, step, "fd_classifier")
            if mean:
                found.append((series, f"{results.name_of(series)}, {step:,} steps", mean, step == n))
    return found


# --- tables over depth -----------------------------------------------------------------------------------------------


def tables_svg(results: Results) -> str | None:
    """Tables over depth: above, every component by layer; below, the first principal component of the first owner."""
    first = next(iter(results.tables), "")
    tables = {k: np.asarray(v) for k, v in results.tables.get(first, {}).items()}
    tables = {k: v for k, v in tables.items() if len(v) > 1}
    if not tables:
        return None
    with figure_of(len(tables), 2.3, 4.6, rows=2, heights=(2.2, 1.5)) as (figure, axes):
        for column, (matrix, table) in enumerate(tables.items()):
            _components(axes[column], matrix, table, first=column == 0)
            _principal(axes[len(tables) + column], matrix, results, first=column == 0)
        if len(results.tables) > 1:  # which learngene or target each curve is of
            key_below(figure, axes[len(tables) : len(tables) + 1])
        return svg_of(figure, "tables", "Numbers of each layer over depth, by matrix")


def _components(axis: Any, matrix: str, table: np.ndarray, first: bool) -> None:
    centered = table - table.mean(axis=0)
    order = np.argsort(np.linspace(-1, 1, len(table)) @ centered)
    limit = np.quantile(np.abs(centered), 0.98) or 1.0
    axis.imshow(centered[:, order].T, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set_title(matrix)
    layers = np.linspace(0, len(table) - 1, min(3, len(table))).round().astype(int)
    axis.set_xticks(layers, [str(layer + 1) for layer in layers])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xlabel("layer")
    if first:
        axis.set_ylabel("components")


def _principal(axis: Any, matrix: str, results: Results, first: bool) -> None:
    who, table = next((who, np.asarray(tables[matrix])) for who, tables in results.tables.items())
    fit = linearity(table)
    axis.set_xlim(-0.06, 1.06)
    axis.set_xlabel("relative depth")
    axis.set_yticks([])
    axis.set_xticks([0, 0.5, 1])
    if first:
        axis.set_ylabel("first component")
    if fit is None:
        axis.text(0.5, 0.5, "the same in every layer", transform=axis.transAxes, ha="center", color=FAINT, size=9)
        return
    depth = np.linspace(0, 1, len(table))
    axis.plot(depth, np.polyval(np.polyfit(depth, fit.score, 1), depth), color=GRID, lw=3, zorder=1)
    axis.plot(depth, fit.score, color=INK, lw=1.4, marker="o", ms=3.4, zorder=3, label=who)
    others = {name: t[matrix] for name, t in results.tables.items() if name != who and matrix in t}
    for i, (name, rows) in enumerate(sorted(others.items(), key=lambda item: len(item[1]))):
        projected = (np.asarray(rows) - fit.mean) @ fit.direction
        at = np.linspace(0, 1, len(projected)) if len(projected) > 1 else np.array([0.5])
        shade = _mix(color_of(results.main, results), 0.35 + 0.5 * i / max(1, len(others) - 1))
        axis.plot(at, projected, color=shade, lw=1.2, marker="o", ms=2.6, zorder=2, label=name)
    axis.set_title(f"r = {fit.correlation:.2f}", size=9, weight="normal", color=FAINT)


def _mix(color: str, weight: float) -> tuple[float, ...]:
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(1 - weight * (1 - c) for c in rgb)


FIGURES: dict[str, Callable[[Results], str | None]] = {
    "curves": curves_svg,
    "map": map_svg,
    "saved": saved_svg,
    "break_even": break_even_svg,
    "depths": depths_svg,
    "costs": costs_svg,
    "storage": storage_svg,
    "bars": bars_svg,
    "tables": tables_svg,
}
"""Figures by the section of the page that shows them."""
