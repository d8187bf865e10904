"""Figures that stand alone, as PNG: for a README, a document, or the end of a demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fine_dist.core.errors import ConfigError
from fine_dist.study.report.canvas import FAINT, INK, key_below, new_figure, pixels_of, style
from fine_dist.study.report.figures import break_even_panels, curve_panels, curve_targets, map_panels
from fine_dist.study.report.results import Picture, Results, number
from fine_dist.study.report.worth import break_even, end_curve


def save_poster(name: str, results: Results, path: str | Path, series: Sequence[str] | None = None) -> Path:
    """Draw one of `POSTERS` as a PNG of about 1,600 pixels' width.

    Args:
        name: Name of the poster.
        results: The results.
        path: Where the PNG goes.
        series: Series to draw; None: all.

    Raises:
        ConfigError: There is no such poster or series, or the results lack what it shows.
    """
    if name not in POSTERS:
        raise ConfigError(f"figure {name!r} is unknown; legal are {', '.join(POSTERS)}")
    if series is not None:
        if unknown := sorted(set(series) - set(results.series)):
            raise ConfigError(f"no such series: {', '.join(unknown)}; there are {', '.join(results.series)}")
        kept = [m for m in results.measurements if m.series in series]
        results = results.model_copy(update={"measurements": kept})
    with style():
        figure = POSTERS[name](results)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, facecolor="white", metadata={"Software": None})
    return path


def _curves(results: Results) -> Any:
    targets = _some(curve_targets(results), "curves: no target was measured at two steps")
    figure = new_figure(3.9 * len(targets), 3.4)
    axes = list(figure.subplots(1, len(targets), squeeze=False).flat)
    curve_panels(axes, results, targets)
    key_below(figure, axes)
    return figure


def _map(results: Results) -> Any:
    lengths = {t: max(len(end_curve(results, s, t).steps) for s in results.series) for t in results.targets}
    targets = _some([t for t, count in lengths.items() if count >= 3], "map: no series was trained for three lengths")
    figure = new_figure(3.9 * len(targets), 3.4)
    axes = list(figure.subplots(1, len(targets), squeeze=False).flat)
    map_panels(axes, results, targets)
    key_below(figure, axes)
    return figure


def _break_even(results: Results) -> Any:
    found = break_even(results)
    if found is None:
        raise ConfigError("break_even: no series but the baseline reaches the baseline's loss at every depth")
    panels = 2 if any(line.free for line in found.lines) else 1
    figure = new_figure(4.9 * panels, 3.4)
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    break_even_panels(axes, results)
    key_below(figure, axes)
    return figure


def _samples(results: Results) -> Any:
    """Samples side by side: a row per series, a column per training length, all from the same noise."""
    rows = sample_rows(results)
    if not rows:
        raise ConfigError("samples: these results have no sample grids of targets")
    target, by_series = rows
    columns = sorted({step for pictures in by_series.values() for step in pictures})
    real = [p for p in results.pictures if p.method is None and p.target is None][:1]
    height, width = next(iter(next(iter(by_series.values())).values())).image.shape[1:]
    panel = 3.0
    extra = 1 if real or _ancestor_picture(results) else 0
    figure = new_figure(panel * (len(columns) + extra) + 1.2, (panel * height / width + 0.45) * len(by_series) + 0.3)
    grid = figure.subplots(len(by_series), len(columns) + extra, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    for row, (series, pictures) in zip(grid, by_series.items()):
        for axis, step in zip(row, columns):
            if step in pictures:
                _show(axis, pictures[step], _state_name(results, series, target, step))
    if extra:
        shown = [("its ancestor" if p.method is None and p.target else "real data", p)
                 for p in (_ancestor_picture(results), *real) if p]  # fmt: skip
        for row, (title, picture) in zip(grid, shown):
            _show(row[-1], picture, title)
    return figure


def _ancestor_picture(results: Results) -> Picture | None:
    return next((p for p in results.pictures if p.method is None and p.target is not None), None)


def sample_rows(results: Results) -> tuple[int, dict[str, dict[int, Picture]]] | None:
    """The depth nearest the middle that most series have samples of: (depth, series -> step -> picture)."""
    shown = [p for p in results.pictures if p.method is not None and p.step is not None and p.series in results.series]
    if not shown:
        return None
    middle = float(np.median(results.targets))
    target = min({p.target for p in shown if p.target}, key=lambda t: (-_count(shown, t), abs(t - middle)))
    by_series: dict[str, dict[int, Picture]] = {}
    for series in results.series:
        found = {p.step: p for p in shown if p.series == series and p.target == target and p.step is not None}
        if found:
            by_series[series] = dict(sorted(found.items()))
    return target, by_series


def _count(pictures: list[Picture], target: int | None) -> int:
    return len({p.series for p in pictures if p.target == target})


def _state_name(results: Results, series: str, target: int, step: int) -> str:
    init = results.init_steps(series, target)
    parts = [f"{init:,} init steps"] if init else []
    parts += [f"{step:,} training steps"] if step or not parts else []
    mean = results.mean(series, target, step)
    loss = f"\nloss {number(mean.mean)}" if mean else ""
    return f"{results.name_of(series)}: {' + '.join(parts)}{loss}"


def _show(axis: Any, picture: Picture, title: str) -> None:
    axis.imshow(pixels_of(picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, size=9, pad=5, color=INK if "\n" in title else FAINT, weight="normal")


def _some(targets: list[int], message: str) -> list[int]:
    if not targets:
        raise ConfigError(message)
    return targets


POSTERS: dict[str, Callable[[Results], Any]] = {
    "curves": _curves,
    "map": _map,
    "break_even": _break_even,
    "samples": _samples,
}
"""Posters by name."""
