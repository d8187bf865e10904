"""The points of a grid: every combination of some lists, named by what varies."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fine_dist.errors import LaunchError


class Point(NamedTuple):
    """One point of a grid."""

    name: str
    values: dict[str, Any]


def expand(grid: Mapping[str, Any]) -> list[Point]:
    """All combinations of a grid, the last key fastest.

    grid: dotted config key -> list of values; anything that is no list holds for every point and is not named.

    A point's name is made of what varies: `{"depth": [4, 6], "seed": [0, 1]}` gives `depth4-seed0`, `depth4-seed1`, ...
    Raises `LaunchError` when a list is empty or two points get one name.
    """
    axes = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    varying = [key for key, value in grid.items() if isinstance(value, list)]
    for key in varying:
        if not axes[key]:
            raise LaunchError(f"grid key {key}: an empty list makes no task; give one value or more")
    points = []
    for chosen in itertools.product(*axes.values()):
        values = dict(zip(axes, chosen))
        parts = [f"{key.rpartition('.')[2]}{_slug(values[key])}" for key in varying if len(axes[key]) > 1]
        points.append(Point("-".join(parts) or "task", values))
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LaunchError(f"grid: several points are named {twice[0]!r}; a value is listed twice")
    return points


def _slug(value: Any) -> str:
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", str(value)).strip("_")
    return text if len(text) <= 40 else text[-40:]
