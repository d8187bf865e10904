"""The meaning of rows and columns of a DiT's tensors, so that rules over widths keep tensors consistent.

An axis is `(groups, space)`: a number of chunks, each over the same space. A block's qkv has rows `(3, "heads")` (q, k
and v, head by head) and columns `(1, "stream")`. A rule that selects units of a space selects the same units wherever
the space occurs, so that the result is a consistent network.

Spaces: `stream` the tokens' D, `condition` the conditioning vector's D, `time` the time embedder's hidden D, `heads`
attention's D (A heads of D / A), `hidden` the MLP's 4 D. Axes without a space (`None`): patches, sinusoids, classes and
outputs.
"""

from __future__ import annotations

from typing import NamedTuple

from fine_dist.model.arch import Arch


class Axis(NamedTuple):
    """Rows or columns of a tensor: `groups` chunks over one space."""

    groups: int
    space: str


STREAM, CONDITION, TIME = Axis(1, "stream"), Axis(1, "condition"), Axis(1, "time")
HEADS, HIDDEN = Axis(1, "heads"), Axis(1, "hidden")
SPACES = ("stream", "condition", "time", "heads", "hidden")

MATRIX_AXES: dict[str, tuple[Axis, Axis]] = {
    "qkv": (Axis(3, "heads"), STREAM),
    "o": (STREAM, HEADS),
    "in": (HIDDEN, STREAM),
    "out": (STREAM, HIDDEN),
    "adaln": (Axis(6, "stream"), CONDITION),
}
"""(rows, columns) of a block's matrices; a bias has the axis of the rows."""

SHELL_AXES: dict[str, tuple[Axis | None, Axis | None]] = {
    "patch": (STREAM, None),
    "time.hidden": (TIME, None),
    "time.out": (CONDITION, TIME),
    "label": (None, CONDITION),
    "final.adaln": (Axis(2, "stream"), CONDITION),
    "final.linear": (None, STREAM),
}
"""(rows, columns) of the matrices outside the blocks, by the module's name."""


def axes_of(name: str) -> tuple[Axis | None, ...]:
    """The axes of a dense DiT's tensor by its state-dict name: (rows, columns) of a weight, (rows,) of a bias."""
    module, _, leaf = name.rpartition(".")
    axes = MATRIX_AXES[module.rpartition(".")[2]] if module.startswith("blocks.") else SHELL_AXES[module]
    return axes if leaf == "weight" else axes[:1]


def size_of(arch: Arch, space: str) -> int:
    """Number of units of a space."""
    return arch.hidden_size * (4 if space == "hidden" else 1)
