"""The cost of a run, as recorded in DONE.json, so that comparisons need not build a model to count FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunCost:
    """The cost of a run so far, including earlier starts.

    steps:   updates.
    samples: samples that were trained on: updates x global batch.
    flops:   of all forward and backward passes, a teacher's forward passes included.
    seconds: wall-clock; of a target in a pack, its share of the pack's time by depth.
    stored:  numbers in the artifact that the run has written.
    trained: numbers that were updated.
    """

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    stored: int = 0
    trained: int = 0

    @classmethod
    def of(
        cls, *, steps: int, batch: int, flops_per_sample: float, seconds: float, stored: int, trained: int
    ) -> RunCost:
        """The cost of so many steps of so many samples."""
        samples = steps * batch
        return cls(steps, samples, samples * flops_per_sample, round(seconds, 3), stored, trained if steps else 0)

    def to_json(self) -> dict[str, Any]:
        """As `cost` in DONE.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, done: Mapping[str, Any]) -> RunCost:
        """From the content of DONE.json. KeyError or TypeError when it has no such record."""
        return cls(**done["cost"])
