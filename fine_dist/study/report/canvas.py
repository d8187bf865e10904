"""Drawing of figures: matplotlib without a display, one style, and SVG that a page can make interactive.

Figures on the page have no legend: the page has one legend of all series above the figures, which hides and shows a
series in all of them. For that, `tag` marks a matplotlib artist with the number of its series, and `svg_of` turns the
mark into an attribute. Points with a tooltip are circles on top of the drawing.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from colorsys import hsv_to_rgb
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from fine_dist.study.report.measurements import Picture
from fine_dist.study.report.results import Results

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a name that a user gave is a dollar sign
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#cbd2d9",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "legend.frameon": False,
}
# the colors of Okabe and Ito, distinguishable with any color vision; yellow is left out, because it is pale on white
_MAIN, _BASELINE = "#0072b2", "#d55e00"
_OTHERS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c6d31")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")


class Mark(NamedTuple):
    """A point with the tooltip `text`, in the data coordinates of its axis."""

    axis: Any
    x: float
    y: float
    series: int
    text: str


def color_of(series: str, results: Results) -> str:
    """The color of a series, the same in every figure."""
    given = {results.main: _MAIN, results.baseline: _BASELINE, **results.colors}
    others = [s for s in results.series if s not in given]
    if series in given or series not in others:
        return given.get(series, _MAIN)
    index = others.index(series)
    if index < len(_OTHERS):
        return _OTHERS[index]
    # hues a golden section apart stay distinct for as long as possible
    shades = hsv_to_rgb(index * 0.618034 % 1, 0.75, 0.8 if index % 2 else 0.6)
    return "#" + "".join(f"{round(255 * shade):02x}" for shade in shades)


def marker_of(series: str, results: Results) -> str:
    """The marker of a series, the same in every figure; it distinguishes series with similar colors."""
    if series in (results.main, results.baseline):
        return "o"
    others = [s for s in results.series if s not in (results.main, results.baseline)]
    return _MARKERS[others.index(series) % len(_MARKERS)] if series in others else "o"


@contextmanager
def figure_of(
    columns: int, width: float, height: float, rows: int = 1, heights: tuple[float, ...] = (1.0,)
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes, row by row.

    Args:
        columns: Number of panels in a row.
        width: Width of a panel in inches.
        height: Height of the figure in inches.
        rows: Number of rows.
        heights: Relative heights of the rows.
    """
    with style():
        yield panels(columns, width, height, rows, heights)


def panels(
    columns: int, width: float, height: float, rows: int = 1, heights: tuple[float, ...] = (1.0,)
) -> tuple[Any, list[Any]]:
    """As `figure_of`, in the style that is set."""
    figure = new_figure(width * columns, height)
    return figure, list(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flat)


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure without pyplot, which would keep every figure in memory and look for a display."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03))
    FigureCanvasAgg(figure)
    return figure


def key_below(figure: Any, axes: list[Any]) -> None:
    """Add a legend below a separate figure (PNG); the figure grows by its height, so that no curve is covered."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    if not handles:
        return
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(width / 2.2)))
    figure.set_size_inches(width, height + 0.24 * -(-len(handles) // columns) + 0.1)
    names = list(handles)[::-1]
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=columns, fontsize=9.5,
                  handlelength=1.4, labelcolor=INK)  # fmt: skip


def tag(artist: Any, series: int) -> Any:
    """Mark an artist as part of a series, by the number of the series."""
    artist.set_gid(f"series--{series}")
    return artist


def svg_of(figure: Any, name: str, title: str, marks: list[Mark] | None = None) -> str:
    """The figure as an inline SVG that takes the page's font and width.

    Args:
        figure: The figure.
        name: Salt of the figure's ids, which must differ from those of other figures on the page.
        title: Text for screen readers.
        marks: Points with a tooltip.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(
        r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"',
        lambda match: f'{match[1]}role="img" aria-label="{escape(title)}"',
        svg,
        count=1,
    )
    svg = re.sub(r'height="[\d.]+pt"|width="[\d.]+pt"', "", svg)
    svg = re.sub(r'id="series--(\d+)"', r'class="series" data-series="\1"', svg)
    # matplotlib numbers these ids from 1 in every figure; two figures on one page would share them
    svg = re.sub(
        r'id="((?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|Poly|Fill|Line|image|Path)[\w.]*)"',
        "",
        svg,
    )
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    height = figure.get_size_inches()[1] * 72
    circles = "".join(_circle(mark, height, 72 / figure.dpi) for mark in marks or ())
    return svg.replace("</svg>", f"{circles}</svg>")


def _circle(mark: Mark, height: float, scale: float) -> str:
    """The SVG circle of a mark. The layout must be final, because data coordinates become points (72 to the inch)."""
    x, y = mark.axis.transData.transform((mark.x, mark.y)) * scale
    return (
        f'<circle class="series mark" data-series="{mark.series}" cx="{x:.1f}" cy="{height - y:.1f}" r="6">'
        f"<title>{escape(mark.text)}</title></circle>"
    )


def pixels_of(picture: Picture) -> np.ndarray:
    """The pixels of a sample grid as [H, W] or [H, W, 3]."""
    return picture.image[0] if picture.image.shape[0] == 1 else picture.image.transpose(1, 2, 0)


def picture_png(picture: Picture, width: int = 480) -> bytes:
    """The PNG of a sample grid, enlarged by an integer to about `width` pixels, because browsers blur small images."""
    pixels = (np.clip(pixels_of(picture), 0, 1) * 255).round().astype(np.uint8)
    zoom = max(1, math.ceil(width / pixels.shape[1]))
    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
