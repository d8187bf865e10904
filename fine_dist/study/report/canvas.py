"""How the report draws: matplotlib without a display, one style, inline SVG, PNG bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fine_dist.study.report.results import Picture

INK, FAINT, LINES = "#1f2933", "#7b8794", "#e4e7eb"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#cbd2d9",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": LINES,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "legend.frameon": False,
}


@contextmanager
def figure_of(
    columns: int, width: float, height: float, rows: int = 1, heights: tuple[float, ...] = (1.0,)
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with its axes row by row; inches a column, and in all."""
    with style():
        figure = new_figure(width * columns, height)
        yield figure, list(figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flat)


@contextmanager
def style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """Without pyplot, which keeps every figure and looks for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03))
    FigureCanvasAgg(figure)
    return figure


FEW = 8
"""Series that a key inside a panel has room for."""


def key(figure: Any, axis: Any, handles: list[Any], names: list[str], loc: str) -> None:
    """Name the series: in a panel where they are few, else below the figure, which grows by the room that takes."""
    look = {"fontsize": 9.5, "handlelength": 1.4, "labelcolor": INK}
    if len(names) <= FEW:
        axis.legend(handles, names, loc=loc, **look)
        return
    width, height = figure.get_size_inches()
    columns = max(2, int(width / 2.4))
    figure.set_size_inches(width, height + 0.22 * -(-len(names) // columns) + 0.2)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, **look)


def svg_of(figure: Any, name: str, title: str) -> str:
    """The figure as an inline SVG that takes the page's font and width; ids are its own (`name` salts them)."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(
        r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"', rf'\1role="img" aria-label="{title}"', svg, count=1
    )
    svg = re.sub(r'height="[\d.]+pt"|width="[\d.]+pt"', "", svg)
    svg = re.sub(
        r'id="((?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|Poly|Line|image)[\w.]*)"', "", svg
    )
    return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)


def pixels_of(picture: Picture) -> np.ndarray:
    """[H, W] or [H, W, 3], as an image library wants it."""
    return picture.image[0] if picture.image.shape[0] == 1 else picture.image.transpose(1, 2, 0)


def picture_png(picture: Picture, width: int = 480) -> bytes:
    """The PNG of a picture; whole-number zoom up to about `width` pixels, because browsers blur small images."""
    from PIL import Image

    pixels = (np.clip(pixels_of(picture), 0, 1) * 255).round().astype(np.uint8)
    zoom = max(1, math.ceil(width / pixels.shape[1]))
    buffer = io.BytesIO()
    Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
