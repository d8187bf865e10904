"""The value of an initialization: training steps that it saves, and the number of models that amortize its cost.

Both use only the loss at the *ends* of runs. With a decaying learning-rate schedule every length is a separate run, and
the loss in the middle of a longer run does not predict the loss of a run that ends there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fine_dist.study.report.measurements import TargetMeasurement
from fine_dist.study.report.number_text import number, short
from fine_dist.study.report.results import Results

COUNTS = (1, 3, 10, 30, 100)
"""Numbers of models for which tables give totals."""
MODELS = 100
"""Maximum number of models in the search for the break-even point."""


class Curve(NamedTuple):
    """Losses at the ends of a series' runs at one depth, shortest run first. Means over seeds."""

    steps: list[int]
    losses: list[float]


def end_curve(results: Results, series: str, target: int) -> Curve:
    """The curve of a series at one depth; it may be empty."""
    points = [(step, results.mean(series, target, step)) for step in results.ends(series, target)]
    known = [(step, mean.mean) for step, mean in points if mean is not None and step > 0]
    return Curve([step for step, _ in known], [loss for _, loss in known])


def steps_to_reach(curve: Curve, loss: float) -> float | None:
    """Training steps at which a curve first reaches a loss, interpolated in log(steps); None if it never does."""
    for i, (step, value) in enumerate(zip(curve.steps, curve.losses)):
        if value <= loss:
            if i == 0 or value == loss:
                return float(step)
            before, high = curve.steps[i - 1], curve.losses[i - 1]
            share = (high - loss) / (high - value)
            return math.exp(math.log(before) + share * (math.log(step) - math.log(before)))
    return None


# --- saved steps -----------------------------------------------------------------------------------------------------


class Saving(NamedTuple):
    """Baseline steps that an initialization saves; `at_least` if the baseline never reached the loss."""

    steps: float
    at_least: bool


@dataclass(frozen=True)
class SavedSteps:
    """Steps that a series saves at one depth, by its training length."""

    series: str
    target: int
    saved: dict[int, Saving] = field(default_factory=dict)

    def text(self, length: int) -> str:
        """`2,300`, `> 3,600` or `−150`."""
        steps, at_least = self.saved[length]
        return f"{'> ' if at_least else ''}{steps:,.0f}".replace("-", "−")


def saved_steps(results: Results) -> list[SavedSteps]:
    """For every other series: the baseline steps with the same loss, minus the target's own steps.

    Empty unless the baseline has two training lengths or more. A loss above that of the baseline's shortest run counts
    as the shortest run, so the saving can be negative.
    """
    savings = []
    for target in results.targets:
        scratch = end_curve(results, results.baseline, target)
        if len(scratch.steps) < 2:
            continue
        for series in results.series:
            if series == results.baseline or ":" in series:
                continue
            line = SavedSteps(series, target)
            for step, loss in zip(*end_curve(results, series, target)):
                own = step + results.init_steps(series, target)
                reached = steps_to_reach(scratch, loss)
                line.saved[step] = Saving((reached or scratch.steps[-1]) - own, reached is None)
            if line.saved:
                savings.append(line)
    return savings


# --- break-even ------------------------------------------------------------------------------------------------------


class TotalCost(NamedTuple):
    """FLOPs until n models of a series reach a quality: `shared` once, `own` for each model. Means over depths."""

    series: str
    free: bool
    """Whether ancestors are free public checkpoints, so that their training costs nothing."""
    steps: float
    """Training steps of a model until it reaches the quality."""
    shared: float
    own: float

    def total(self, count: int) -> float:
        """FLOPs for `count` models."""
        return self.shared + count * self.own


@dataclass(frozen=True)
class BreakEven:
    """Total costs of every series that reaches the baseline's loss after `steps` steps at every depth."""

    steps: int
    losses: dict[int, float]
    lines: list[TotalCost]
    missed: list[str]
    """Series that do not reach that loss in the steps they had."""

    def caption(self, results: Results) -> str:
        """A description of the totals in two sentences."""
        losses = ", ".join(f"{number(loss)} at {target} layers" for target, loss in self.losses.items())
        missed = ", ".join(results.name_of(series) for series in self.missed)
        return (
            f"FLOPs until n models reach the loss of {results.name_of(results.baseline)} after {self.steps:,} steps "
            f"({losses}): the shared cost once and the own cost n times, mean over depths."
            + (f" Not reached in the steps they had: {missed}." if missed else "")
        )


def break_even(results: Results, steps: int | None = None) -> BreakEven | None:
    """Total costs at the baseline's loss after `steps` steps; None if no other series reaches that loss.

    The default of `steps` is the longest run of the baseline whose loss another series reaches.
    """
    if steps is None:
        for length in sorted(common_lengths(results), reverse=True):
            costs_there = break_even(results, length)
            if costs_there is not None:
                return costs_there
        return None
    targets = [t for t in results.targets if results.ends(results.baseline, t)]
    if not targets:
        return None
    means = {t: results.mean(results.baseline, t, steps) for t in targets}
    losses = {t: mean.mean for t, mean in means.items() if mean is not None}
    lines, missed = [], []
    for series in results.series:
        if ":" in series or not all(results.ends(series, t) for t in losses):
            continue
        costs = [_cost(results, series, target, loss) for target, loss in losses.items()]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(losses) or not losses:
            missed.append(series)
            continue
        mean_steps, shared, ancestor, own = (float(np.mean(values)) for values in zip(*known))
        lines.append(TotalCost(series, False, mean_steps, shared, own))
        if ancestor:
            lines.append(TotalCost(series, True, mean_steps, shared - ancestor, own))
    costed = all(line.own > 0 or line.shared > 0 for line in lines)
    others = {line.series for line in lines} - {results.baseline}
    return BreakEven(steps, losses, lines, missed) if costed and others else None


def _cost(results: Results, series: str, target: int, loss: float) -> tuple[float, float, float, float] | None:
    """(training steps, shared FLOPs, the ancestors' part of them, own FLOPs) until a series reaches a loss."""
    start = results.mean(series, target, 0)
    initialized = next((m for m in results.at(series, target, 0) if m.stage == "init" and m.steps_init), None)
    if initialized is not None and start is not None and start.mean <= loss:
        return 0.0, initialized.flops_condense, initialized.flops_ancestor, initialized.flops
    steps = steps_to_reach(end_curve(results, series, target), loss)
    if steps is None:
        return None
    end: TargetMeasurement = results.at(series, target, results.ends(series, target)[-1])[0]
    before = initialized.flops if initialized else 0.0
    own = before + (end.flops - before) * steps / max(1, end.step)
    return steps, end.flops_condense, end.flops_ancestor, own


def common_lengths(results: Results) -> set[int]:
    """Training lengths of the baseline at every depth at which it was trained."""
    ends = [set(results.ends(results.baseline, t)) for t in results.targets if results.ends(results.baseline, t)]
    return set.intersection(*ends) if ends else set()


def cheapest(costs: BreakEven, free: bool) -> list[tuple[int, int, TotalCost]]:
    """Ranges (first n, last n, series) in which a series costs least in all, for n = 1..MODELS.

    Args:
        costs: The total costs.
        free: Whether ancestors are free. Series without an ancestor cost the same either way.
    """
    with_free = {line.series for line in costs.lines if line.free}
    lines = [line for line in costs.lines if line.free == (free and line.series in with_free)]
    ranges: list[tuple[int, int, TotalCost]] = []
    for count in range(1, MODELS + 1):
        best = min(lines, key=lambda line: line.total(count))
        if ranges and ranges[-1][2] == best:
            ranges[-1] = (ranges[-1][0], count, best)
        else:
            ranges.append((count, count, best))
    return ranges


def cheapest_lines(results: Results, costs: BreakEven) -> list[str]:
    """Two sentences: which series is cheapest for how many models, with the ancestor trained and with a free one."""
    sentences = []
    for free in (False, True):
        if free and not any(line.free for line in costs.lines):
            continue
        parts = []
        for first, last, line in cheapest(costs, free):
            span = (
                "any number of" if (first, last) == (1, MODELS) else f"{first}" if first == last else f"{first}-{last}"
            )
            span = f"{first} or more" if last == MODELS and first > 1 else span
            plural = "model" if span == "1" else "models"
            parts.append(f"{span} {plural}: {results.name_of(line.series)}")
        sentences.append(f"Cheapest with {'a free ancestor' if free else 'every stage paid for'}: {'; '.join(parts)}.")
    return sentences


def recommendation(results: Results) -> list[str]:
    """Lines that recommend a series by number of models, at each quality that the baseline's runs define."""
    if not results.baseline or not results.targets:
        return []
    best, lines = break_even(results), []
    for length in sorted(common_lengths(results) & {results.budget, best.steps if best else None}):
        costs = break_even(results, length)
        if costs is None:
            continue
        quality = "/".join(number(loss) for loss in costs.losses.values())
        depths = "/".join(map(str, costs.losses))
        lines.append(
            f"At the quality of {results.name_of(results.baseline)} after {length:,} steps (held-out loss {quality} at "
            f"{depths} layers):"
        )
        for free in (False, True):
            if free and not any(line.free for line in costs.lines):
                continue
            for first, last, line in cheapest(costs, free):
                span = f"{first} model{'s' if last > 1 else ''}" if first == last else f"{first}-{last} models"
                if last == MODELS:
                    span = "any number of models" if first == 1 else f"{first} models or more"
                against = next((o for o in costs.lines if o.series == results.baseline), None)
                versus = ""
                if against and line.series != results.baseline:
                    share = line.total(first) / against.total(first)
                    versus = f", {share:.0%} of what {results.name_of(results.baseline)} takes"
                steps = f"{line.steps:,.0f} training steps each" if line.steps else "no training after initialization"
                lines.append(
                    f"  {span}{' (free ancestor)' if free else ''}: {results.name_of(line.series)}, {steps}, "
                    f"{short(line.total(first))}FLOPs in all for {first}{versus}"
                )
        if costs.missed:
            lines.append(f"  not reached by: {', '.join(map(results.name_of, costs.missed))}")
    longest = max(common_lengths(results), default=0)
    if lines and best and longest > best.steps:
        name = results.name_of(results.baseline)
        lines.append(
            f"The quality of {name} after {longest:,} steps was reached by no other series at every depth in the "
            f"steps it had: train {name} for so long, or give the others more steps."
        )
    return lines
