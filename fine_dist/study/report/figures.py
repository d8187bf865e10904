"""The figures of a report's page: totals, bars, trade-offs of quality and cost, and scalers over depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fine_dist.study.report.canvas import FAINT, GRID, INK, Mark, color_of, figure_of, key_below, marker_of, svg_of, tag
from fine_dist.study.report.claims import linearity
from fine_dist.study.report.curve_figures import curves_svg, draw, map_svg
from fine_dist.study.report.measurements import Mean
from fine_dist.study.report.number_text import mean_text, number, short
from fine_dist.study.report.results import Results
from fine_dist.study.report.saved_figure import saved_svg
from fine_dist.study.report.tables import storage_of
from fine_dist.study.report.worth import MODELS, break_even


def break_even_svg(results: Results) -> str | None:
    """Total FLOPs for n models against n, with every stage paid for and with a free ancestor."""
    costs = break_even(results)
    if costs is None:
        return None
    panels = 2 if any(line.free for line in costs.lines) else 1
    with figure_of(panels, 4.9, 3.4) as (figure, axes):
        marks = break_even_panels(axes, results)
        return svg_of(figure, "break-even", "Total FLOPs for n models against n", marks)


def break_even_panels(axes: list[Any], results: Results) -> list[Mark]:
    """Draw total FLOPs for n = 1..100 models: every stage paid for, and (second axis) with free ancestors."""
    costs, marks = break_even(results), []
    counts = np.unique(np.logspace(0, np.log10(MODELS), 40).round().astype(int))
    for axis, free in zip(axes, (False, True)):
        with_free = {line.series for line in costs.lines if line.free} if costs else set()
        for line in reversed(costs.lines if costs else []):
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
    quality = f"\nto reach {results.name_of(results.baseline)} after {costs.steps:,} steps" if costs else ""
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
    stored = storage_of(results)
    if len(stored) < 2:
        return None
    counts = np.arange(0, 11)
    with figure_of(1, 9.4, 3.0) as (figure, [axis]):
        axis.plot(counts, counts * stored[0].own, color=FAINT, lw=1.4, ls=(0, (4, 3)))
        axis.annotate("dense models", (counts[-3], counts[-3] * stored[0].own), (8, -6), textcoords="offset points",
                      ha="left", va="top", color=FAINT, size=9)  # fmt: skip
        marks = []
        for row in stored[1:]:
            index, color = results.series.index(row.series), color_of(row.series, results)
            totals = [row.total(int(n)) for n in counts]
            tag(axis.plot(counts, totals, color=color, lw=2 if row.series == results.main else 1.2)[0], index)
            marks += [Mark(axis, float(n), t, index, f"{row.label}, {n} models: {t:,} numbers") for n, t in
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
                marks.append(Mark(axis, mean.mean, y, index, f"{name}, {target} layers: {mean_text(mean)}"))
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
    bars = []
    for series in results.series:
        for step in sorted({m.step for m in trained}):
            mean = results.mean(series, target, step, "fd_classifier")
            if mean:
                bars.append((series, f"{results.name_of(series)}, {step:,} steps", mean, step == n))
    return bars


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
