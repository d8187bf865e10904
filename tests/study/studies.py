"""Studies that tests plan and run: the digits with entries of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fine_dist.study.config import StudyConfig, load_study

DIGITS = Path(__file__).with_name("digits.yaml")
FINE: dict[str, Any] = {
    "name": "fine", "method": {"name": "fine"}, "condense": {"steps": "C"}, "init": {"steps": "I"}
}  # fmt: skip
SCRATCH: dict[str, Any] = {"name": "scratch", "method": {"name": "scratch"}, "train": ["N", "3N"]}
SMALL: dict[str, Any] = {
    "seeds": [0],
    "depths": [1, 2],
    "steps": {"C": 2, "I": 2, "N": 4},
    "features": None,
    "pictures": 0,
    "stages": {stage: {"batch": 8} for stage in ("condense", "init", "train")},
    "tune": {"optim.lr": [1e-5, 1e-2]},
    "tune_extend": 0,
    "tune_depth": 2,
}
"""Settings of a study that runs in seconds."""


def study(*entries: dict[str, Any], **changes: Any) -> StudyConfig:
    """The digits' study with other entries; FINE and scratch where none are given."""
    return load_study(DIGITS, entries=list(entries) or [FINE, SCRATCH], **changes)
