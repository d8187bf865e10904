"""One job of a pack: its settings, its progress, and the observer of its events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fine_dist.data.settings import DataConfig
from fine_dist.family.packing import EarlyStop

JobState = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class PackJob:
    """One job of a pack. `seed` determines the order of its data and its noise; `domain` names its data set."""

    name: str
    key: str
    """Hash of everything that determines the job's result; a saved state with another key belongs to another job."""
    domain: str
    data: DataConfig
    num_classes: int
    seed: int
    lr: float
    steps: int


@dataclass
class JobProgress:
    """The progress of a job, which is part of a checkpoint."""

    step: int = 0
    """Steps whose losses and norms the host has read."""
    state: JobState = "running"
    reason: str | None = None
    seconds: float = 0.0
    """This job's share of the wall-clock time: the seconds of a step are divided in proportion to depth."""
    window: list[float] = field(default_factory=list)
    """Losses since the last logged row."""
    recent: list[float] = field(default_factory=list)
    """Losses in the two windows that an early stop compares."""
    bad_steps: int = 0
    """Steps that were skipped because a loss or gradient was not finite."""

    def stopped_improving(self, loss: float, rule: EarlyStop | None) -> bool:
        """Add the loss of this step; returns whether the rule ends the job after it."""
        if rule is None:
            return False
        size, recent = rule.window, self.recent
        recent.append(loss)
        # Only the last two windows are compared, and the list is part of every saved state.
        del recent[: -2 * size]
        # Compared once for each window and not at every step: neighboring means overlap, and with so many comparisons
        # noise would end the job sooner or later.
        if len(recent) < 2 * size or self.step % size:
            return False
        return sum(recent[size:]) > sum(recent[:size]) * (1 - rule.min_gain)


class PackObserver(Protocol):
    """Receives the events of jobs, on rank 0 only. A job is named by its index."""

    def row(self, job: int, step: int, values: dict[str, float]) -> None:
        """Means over the steps since the last row."""

    def evaluate(self, job: int, step: int) -> None:
        """The job is due for evaluation: before its first step, then every `engine.eval_every` steps."""

    def ended(self, job: int, progress: JobProgress) -> None:
        """The job is done or has failed."""

    def after_step(self, progress: Sequence[JobProgress]) -> None:
        """The pack has taken a step."""
