"""Every method as a case of the contract, at sizes for tests, and what tests of single methods take from it."""

from __future__ import annotations

from typing import Any

from fine_dist.core.config import validate
from fine_dist.methods import METHODS, build
from fine_dist.methods.base import Method, Parent
from fine_dist.methods.fine.config import FineConfig
from fine_dist.model.artifact import Artifact
from fine_dist.testing import MethodContract, condensed, moved, saved, trained

TINY: dict[str, dict[str, Any]] = {
    # settings for a width of 32 and few layers, where a paper's own suit large models
    "fine": {"rank": 24},
    "sws": {"stages": (1, 2, 1)},
    "sweet": {"components": 6},
    "tleg": {"auxiliary_layers": 3},
    "wave": {"side": 16},
}
CASES: dict[str, type[MethodContract]] = {
    name: type(
        f"Test_{name}",
        (MethodContract,),
        {"name": name, "settings": TINY.get(name, {}), "learngene": FineConfig(rank=24)},
    )
    for name in METHODS
}
# methods that go from the parent's size in one direction alone
CASES["ligo"].depths, CASES["ligo"].wide_depth = (4, 6), 4  # type: ignore[misc]
selection = CASES["weight_selection"]
selection.depths, selection.wide_depth, selection.width = (1, 2, 4), 4, 16  # type: ignore[misc]


def tiny(name: str, **settings: Any) -> Method[Any]:
    """A method with settings that suit a tiny model."""
    kind = METHODS[name].Config
    return build(validate(kind, {"name": name, **TINY.get(name, {}), **settings}))


def artifact_for(name: str) -> Artifact | None:
    """What a target of this method comes from; none for a method that needs nothing."""
    return CASES[name].artifact()


def parent_for(name: str) -> Parent | None:
    return CASES[name].parent()


__all__ = ["CASES", "TINY", "artifact_for", "condensed", "moved", "parent_for", "saved", "tiny", "trained"]
