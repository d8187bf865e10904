"""The points of a grid: every combination of some axes, named by what varies."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fine_dist.core.errors import ConfigError


class GridAxis(NamedTuple):
    """One axis of a grid."""

    name: str
    """The setting, for messages."""
    values: Sequence[Any]
    label: Callable[[Any], str]
    """A value's part of a point's name; an empty label adds nothing to it."""


class Point(NamedTuple):
    """One point of a grid: its name, and a value of each axis."""

    name: str
    values: tuple[Any, ...]


def expand(axes: Sequence[GridAxis]) -> list[Point]:
    """All combinations of the axes' values; the last axis varies fastest.

    Raises:
        ConfigError: An axis has no value or one value twice, or two points have the same name.
    """
    for axis in axes:
        if not axis.values:
            raise ConfigError(f"{axis.name}: an empty list makes no target; give one value or more")
        seen = [str(value) for value in axis.values]
        duplicates = sorted({value for value in seen if seen.count(value) > 1})
        if duplicates:
            raise ConfigError(f"{axis.name}: {duplicates[0]} is listed twice, and two targets would have one name")
    points = []
    # The order is part of what users see: names, tables and indices of tasks follow it.
    for values in itertools.product(*(axis.values for axis in axes)):
        parts = [slug(axis.label(value)) for axis, value in zip(axes, values)]
        points.append(Point("-".join(part for part in parts if part), values))
    names = {point.name for point in points}
    if len(names) < len(points):
        raise ConfigError(
            "two targets of this grid have one name: names have six digits of a number; change the values"
        )
    return points


def slug(text: str) -> str:
    """A text as part of a file name: characters that are not portable become `_`; only the last 40 remain."""
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("_")
    return text if len(text) <= 40 else text[-40:]
