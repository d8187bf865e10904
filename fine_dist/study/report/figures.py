"""The report's pictures, drawn by matplotlib from rows: curves, bars, tables over depth, and the README's summary."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np

from fine_dist.core.errors import ConfigError
from fine_dist.study.report.canvas import FAINT, INK, LINES, figure_of, key, new_figure, pixels_of, style, svg_of
from fine_dist.study.report.cost_table import ratio
from fine_dist.study.report.depth_curves import linearity
from fine_dist.study.report.results import Picture, Results, number

_MAIN, _BASELINE = "#0b7285", "#e8590c"
_OTHERS = ("#7048e8", "#5c940d", "#a61e4d", "#1864ab", "#b08900", "#868e96")


def colour(series: str, results: Results) -> str:
    """The same colour for a series in every picture."""
    given = {results.main: _MAIN, results.baseline: _BASELINE, **results.colours}
    others = [s for s in results.series if s not in given]
    if series in given or series not in others:
        return given.get(series, _MAIN)
    place = others.index(series)
    if place < len(_OTHERS):
        return _OTHERS[place]
    # hues a golden section apart never come near each other soon
    shades = hsv_to_rgb(place * 0.618034 % 1, 0.75, 0.8 if place % 2 else 0.6)
    return "#" + "".join(f"{round(255 * shade):02x}" for shade in shades)


def curves_svg(results: Results) -> str | None:
    """Held-out loss against training steps, a panel a depth. None when no target was trained."""
    targets = [t for t in results.targets if any(len(results.points(s, t)) > 1 for s in results.series)]
    if not targets:
        return None
    with figure_of(len(targets), 3.9, 3.5) as (figure, axes):
        _curve_panels(axes, results, targets)
        return svg_of(figure, "curves", "Held-out loss against training steps, by depth")


def bars_svg(results: Results) -> str | None:
    """Fréchet distances after N steps and more, bars by series, a group a depth. None when none was measured."""
    groups = {t: _bars(results, t) for t in results.targets}
    groups = {t: bars for t, bars in groups.items() if bars}
    if not groups:
        return None
    with figure_of(1, 9.4, 0.9 + 0.31 * sum(len(b) + 1.1 for b in groups.values())) as (figure, axes):
        axis, y, ticks = axes[0], 0.0, []
        for target, bars in groups.items():
            axis.text(0, y - 0.72, f"{target} layers", weight="bold", size=10, va="center")
            for series, name, mean, main in bars:
                axis.barh(y, mean.mean, height=0.74, color=colour(series, results), alpha=1 if main else 0.45)
                if mean.num > 1:
                    axis.errorbar(mean.mean, y, xerr=mean.spread, color=INK, lw=1, capsize=2.5)
                end = (mean.mean + mean.spread, y)
                axis.annotate(number(mean.mean), end, (6, 0), textcoords="offset points", va="center", size=9)
                ticks.append((y, name))
                y += 1
            y += 1.1
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks], color=INK)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="x")
        axis.set_axisbelow(True)
        axis.set_ylim(y - 0.9, -1.2)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.08)
        axis.set_xlabel("Fréchet distance (lower is better)")
        if results.frechet_floor is not None:
            axis.axvline(results.frechet_floor, color=INK, lw=1, ls=(0, (4, 3)))
            at = (results.frechet_floor, y - 0.9)
            axis.annotate("held-out real data", at, (4, 3), textcoords="offset points", size=8.5, va="bottom")
        return svg_of(figure, "bars", "Fréchet distance of samples, by method and depth")


def tables_svg(results: Results) -> str | None:
    """Tables over depth: above, every component by layer; below, the first principal component, with the others'."""
    first = next(iter(results.tables), "")
    tables = {k: np.asarray(v) for k, v in results.tables.get(first, {}).items()}
    tables = {k: v for k, v in tables.items() if len(v) > 1}
    if not tables:
        return None
    with figure_of(len(tables), 2.3, 4.6, rows=2, heights=(2.2, 1.5)) as (figure, axes):
        for column, (matrix, table) in enumerate(tables.items()):
            _map(axes[column], matrix, table, first=column == 0)
            _score(axes[len(tables) + column], matrix, results, first=column == 0)
        return svg_of(figure, "tables", "Numbers of each layer over depth, by matrix")


def summary_png(results: Results, path: str | Path, series: Sequence[str] | None = None) -> Path:
    """One picture for a README: the curves of every depth, and below them real data and samples at one depth.

    Writes a PNG of about 1600 pixels' width and returns its path. Needs a row with a curve; pictures are optional.
    series: whose curves; all unless told. `ConfigError` for one that is not there.
    """
    path = Path(path)
    if series is not None:
        if unknown := sorted(set(series) - set(results.series)):
            raise ConfigError(f"no such series: {', '.join(unknown)}; there are {', '.join(results.series)}")
        results = results.model_copy(update={"rows": [row for row in results.rows if row.series in series]})
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = [t for t in results.targets if any(len(results.points(s, t)) > 1 for s in results.series)]
    if not targets:
        raise ValueError("no target has two measurements: there is no curve to draw")
    shown = _summary_pictures(results)
    with style():
        figure = new_figure(3.9 * len(targets), 3.5 + (2.1 if shown else 0))
        parts = figure.subfigures(2 if shown else 1, 1, height_ratios=(3.5, 2.1) if shown else None, squeeze=False)
        _curve_panels(list(parts[0, 0].subplots(1, len(targets), squeeze=False).flat), results, targets)
        if shown:
            axes = parts[1, 0].subplots(1, len(shown), squeeze=False).flat
            for axis, (title, picture) in zip(axes, shown):
                axis.imshow(pixels_of(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axis.set_title(title, size=10, pad=8)
                axis.set_axis_off()
        figure.savefig(path, dpi=140, facecolor="white", metadata={"Software": None})
    return path


# --- curves --------------------------------------------------------------------------------------------------------


def _curve_panels(axes: list[Any], results: Results, targets: list[int]) -> None:
    shown = [s for s in results.series if any(len(results.points(s, t)) > 1 for t in targets)]
    top, bottom = _loss_range(results, targets, shown)
    for axis, target in zip(axes, targets):
        for series in reversed(shown):
            _curve(axis, results, series, target)
        _mark_budget(axis, results, target)
        axis.set_title(f"{target} layers")
        axis.set_ylim(bottom, top)
        axis.set_xlim(left=0)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        axis.set_xlabel("training steps after initialisation")
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_ylabel("held-out loss")
    handles, names = axes[0].get_legend_handles_labels()
    key(axes[0].figure, axes[0], handles[::-1], names[::-1], "upper right")


def _curve(axis: Any, results: Results, series: str, target: int) -> None:
    points = results.points(series, target)
    if not points:
        return
    steps = list(points)
    means = np.array([np.mean(v) for v in points.values()])
    spreads = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in points.values()])
    shade, name = colour(series, results), results.label(series)
    axis.fill_between(steps, means - spreads, means + spreads, color=shade, alpha=0.18, lw=0)
    marker = {"marker": "o", "ms": 5} if len(steps) == 1 else {"marker": "o", "ms": 2.6}
    axis.plot(
        steps, means, color=shade, lw=2.2 if series in (results.main, results.baseline) else 1.4, label=name, **marker
    )


def _mark_budget(axis: Any, results: Results, target: int) -> None:
    """A dashed level at the main series' loss after N steps: where another crosses it is what is saved."""
    budget = results.budget
    ours = results.mean(results.main, target, budget) if budget else None
    if budget is None or ours is None:
        return
    axis.axhline(ours.mean, color=colour(results.main, results), lw=1, ls=(0, (4, 3)), alpha=0.8)
    most = results.trained_steps(results.baseline, target)
    for at in sorted({budget, most} if most > budget else {budget}):
        if at <= max(step for s in results.series for step in results.points(s, target) or [0]):
            axis.axvline(at, color=LINES, lw=1, zorder=0)
            name = "N" if at == budget else f"{ratio(at / budget)}N"
            axis.annotate(name, (at, 0), xycoords=("data", "axes fraction"), xytext=(3, 4),
                          textcoords="offset points", color=FAINT, size=8.5)  # fmt: skip


def _loss_range(results: Results, targets: list[int], shown: list[str]) -> tuple[float, float]:
    """Down to the least value; up to what shows the main series whole and others from N/3 on.

    An untrained model predicts no noise at all (a loss of 1), and a scale that shows that hides all differences.
    """
    values, tops = [], []
    for target in targets:
        budget = results.budget or max(s for name in shown for s in results.points(name, target) or [1])
        for series in shown:
            points = results.points(series, target)
            values += [np.mean(v) for v in points.values()]
            tops += [np.mean(v) for s, v in points.items() if series == results.main or s >= budget / 3]
    low, high = min(values), max(tops or values)
    return high + 0.12 * (high - low) + 1e-9, low - 0.10 * (high - low) - 1e-9


# --- bars ----------------------------------------------------------------------------------------------------------


def _bars(results: Results, target: int) -> list[tuple[str, str, Any, bool]]:
    """(series, what it is called, its mean, at N) for all that has a Fréchet distance after N or more."""
    n = results.budget
    steps = sorted({r.step for r in results.rows if n and r.step >= n and r.target == target and r.stage == "train"})
    found = []
    for series in results.series:
        for step in steps:
            mean = results.mean(series, target, step, "frechet")
            if mean:
                found.append((series, f"{results.label(series)}, {step:,} steps", mean, step == n))
    return found


# --- tables --------------------------------------------------------------------------------------------------------


def _map(axis: Any, matrix: str, table: np.ndarray, first: bool) -> None:
    centred = table - table.mean(axis=0)
    order = np.argsort(np.linspace(-1, 1, len(table)) @ centred)
    limit = np.quantile(np.abs(centred), 0.98) or 1.0
    axis.imshow(centred[:, order].T, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set_title(matrix)
    layers = np.linspace(0, len(table) - 1, min(3, len(table))).round().astype(int)
    axis.set_xticks(layers, [str(layer + 1) for layer in layers])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xlabel("layer")
    if first:
        axis.set_ylabel("components")


def _score(axis: Any, matrix: str, results: Results, first: bool) -> None:
    who, table = next((who, np.asarray(tables[matrix])) for who, tables in results.tables.items())
    fit = linearity(table)
    axis.set_xlim(-0.06, 1.06)
    axis.set_xlabel("relative depth")
    axis.set_yticks([])
    axis.set_xticks([0, 0.5, 1])
    if first:
        axis.set_ylabel("first component")
    if fit is None:
        axis.text(0.5, 0.5, "does not move", transform=axis.transAxes, ha="center", color=FAINT, size=9)
        return
    depth = np.linspace(0, 1, len(table))
    axis.plot(depth, np.polyval(np.polyfit(depth, fit.score, 1), depth), color=LINES, lw=3, zorder=1)
    axis.plot(depth, fit.score, color=INK, lw=1.4, marker="o", ms=3.4, zorder=3, label=who)
    others = {name: t[matrix] for name, t in results.tables.items() if name != who and matrix in t}
    for i, (name, rows) in enumerate(sorted(others.items(), key=lambda item: len(item[1]))):
        projected = (np.asarray(rows) - fit.mean) @ fit.direction
        at = np.linspace(0, 1, len(projected)) if len(projected) > 1 else np.array([0.5])
        shade = 0.35 + 0.5 * i / max(1, len(others) - 1)
        axis.plot(at, projected, color=_mix(colour(results.main, results), shade), lw=1.2, marker="o", ms=2.6, zorder=2,
                  label=name)  # fmt: skip
    axis.set_title(f"r = {fit.correlation:.2f}", size=9, weight="normal", color=FAINT)
    if first:
        axis.legend(fontsize=7.5, loc="upper left", handlelength=1.0, labelspacing=0.25, borderaxespad=0.2)


def _mix(colour_: str, weight: float) -> tuple[float, ...]:
    rgb = [int(colour_[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return tuple(1 - weight * (1 - c) for c in rgb)


# --- the summary ------------------------------------------------------------------------------------------------------


def _summary_pictures(results: Results) -> list[tuple[str, Picture]]:
    """Real data, then main series and baseline at N for the middle depth with both; fewer where there are fewer."""
    shown = [("real data", p) for p in results.pictures if p.method is None and p.target is None][:1]
    for target in sorted(results.targets, key=lambda t: abs(t - float(np.median(results.targets)))):
        budget = results.budget
        pair = [
            (f"{results.label(s)}, {target} layers, {p.step} steps", p)
            for s in (results.main, results.baseline)
            for p in [p for p in results.pictures if (p.series, p.target, p.step) == (s, target, budget)][:1]
        ]
        if len(pair) == 2:
            return shown + pair
    return shown
