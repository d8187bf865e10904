"""Separate figures as PNG, for a README, a document, or the end of a demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fine_dist.core.errors import ConfigError
from fine_dist.study.report.canvas import FAINT, INK, key_below, new_figure, panels, pixels_of, style
from fine_dist.study.report.curve_figures import curve_panels, curve_targets, map_panels, map_targets
from fine_dist.study.report.figures import break_even_panels
from fine_dist.study.report.measurements import Picture
from fine_dist.study.report.number_text import number
from fine_dist.study.report.results import Results
from fine_dist.study.report.saved_figure import saved_height, saved_lengths, saved_panels
from fine_dist.study.report.worth import break_even


def save_poster(name: str, results: Results, path: str | Path, series: Sequence[str] | None = None) -> Path:
    """Draw one of `POSTERS` as a PNG of about 1,600 pixels' width.

    Args:
        name: Name of the poster.
        results: The results.
        path: Path of the PNG.
        series: Series to draw. None: all series.

    Raises:
        ConfigError: There is no such poster or series, or the results have no data for it.
    """
    if name not in POSTERS:
        raise ConfigError(f"figure {name!r} is unknown; legal are {', '.join(POSTERS)}")
    if series is not None:
        if unknown := sorted(set(series) - set(results.series)):
            raise ConfigError(f"no such series: {', '.join(unknown)}; there are {', '.join(results.series)}")
        shown = [m for m in results.measurements if m.series in series]
        results = results.model_copy(update={"measurements": shown})
    with style():
        figure = POSTERS[name](results)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140, facecolor="white", metadata={"Software": None})
    return path


def _curves(results: Results) -> Any:
    targets = _some(curve_targets(results), "curves: no target was measured at two steps")
    figure, axes = panels(len(targets), 3.9, 3.4)
    curve_panels(axes, results, targets)
    key_below(figure, axes)
    return figure


def _map(results: Results) -> Any:
    targets = _some(map_targets(results), "map: no series was trained for three lengths")
    figure, axes = panels(len(targets), 3.9, 3.4)
    map_panels(axes, results, targets)
    key_below(figure, axes)
    return figure


def _saved(results: Results) -> Any:
    lengths = _some(saved_lengths(results), "saved: the baseline was trained for fewer than two lengths")
    figure = new_figure(2.0 + 3.2 * len(lengths), saved_height(results))
    saved_panels(list(figure.subplots(1, len(lengths), squeeze=False).flat), results)
    return figure


def _break_even(results: Results) -> Any:
    costs = break_even(results)
    if costs is None:
        raise ConfigError("break_even: no series but the baseline reaches the baseline's loss at every depth")
    figure, axes = panels(2 if any(line.free for line in costs.lines) else 1, 4.9, 3.4)
    break_even_panels(axes, results)
    key_below(figure, axes)
    return figure


def _samples(results: Results) -> Any:
    """Strips of samples, one for each state of each series, all from the same noise, labeled with the loss."""
    strips = sample_strips(results)
    if not any(strip.picture.method for strip in strips):
        raise ConfigError("samples: these results have no sample grids of targets")
    heights = [
        s.picture.image.shape[1] / s.picture.image.shape[2] * STRIP + (0.34 if s.heading else 0.06) for s in strips
    ]
    figure = new_figure(STRIP + NAMES, sum(heights))
    figure.set_layout_engine("none")
    top = sum(heights)
    for strip, height in zip(strips, heights):
        inner = height - (0.34 if strip.heading else 0.06)
        bottom = (top - height) / sum(heights)
        axis = figure.add_axes((NAMES / (STRIP + NAMES), bottom, STRIP / (STRIP + NAMES), inner / sum(heights)))
        axis.imshow(pixels_of(strip.picture), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        middle = bottom + inner / sum(heights) / 2
        figure.text(0.005, middle, strip.name, va="center", size=9.5, color=INK)
        figure.text((NAMES - 0.12) / (STRIP + NAMES), middle, strip.value, va="center", ha="right", size=9, color=FAINT)
        if strip.heading:
            figure.text(0.005, bottom + (inner + 0.1) / sum(heights), strip.heading, weight="bold", size=10.5)
        top -= height
    return figure


STRIP, NAMES = 9.0, 4.2
"""Width in inches of a strip of samples, and of the labels to its left."""


class Strip(NamedTuple):
    """A sample grid with its labels. `heading` is set for the first strip of a group."""

    picture: Picture
    name: str
    value: str
    heading: str


def sample_strips(results: Results) -> list[Strip]:
    """Real data and parents first, then the targets by depth, series and step."""
    order = {series: i for i, series in enumerate(results.series)}
    given = [Strip(p, p.caption or "real data", "", "") for p in results.pictures if p.method is None]
    shown = [p for p in results.pictures if p.method is not None and p.step is not None and p.target is not None]
    by_series = {p.method: i for i, p in enumerate(sorted(shown, key=lambda p: order.get(p.method or "", len(order))))}
    shown.sort(key=lambda p: (p.target or 0, by_series[p.method], not p.variant, p.step or 0))
    strips, depth = sorted(given, key=lambda strip: strip.picture.target or 0), None
    for picture in shown:
        if picture.method not in order:
            continue
        heading = f"{picture.target} layers" if picture.target != depth else ""
        depth = picture.target
        target, step = picture.target or 0, picture.step or 0
        mean = results.mean(picture.series, target, step)
        strips.append(
            Strip(picture, _state_name(results, picture), f"loss {number(mean.mean)}" if mean else "", heading)
        )
    return strips


def _state_name(results: Results, picture: Picture) -> str:
    """`FINE, untrained`, `FINE, 100 scaler steps`, `FINE, 100 + 200 steps`."""
    name = results.name_of(picture.method or "")
    init = 0 if picture.variant else results.init_steps(picture.method or "", picture.target or 0)
    if picture.step:
        return f"{name}, {f'{init:,} + ' if init else ''}{picture.step:,} steps"
    return f"{name}, {init:,} steps of initialization" if init else f"{name}, untrained"


def _some(targets: list[int], message: str) -> list[int]:
    if not targets:
        raise ConfigError(message)
    return targets


POSTERS: dict[str, Callable[[Results], Any]] = {
    "curves": _curves,
    "map": _map,
    "saved": _saved,
    "break_even": _break_even,
    "samples": _samples,
}
"""Posters by name."""
