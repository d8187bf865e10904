"""Verdicts of claims on the measurements, by comparisons of means.

A claim is a chain of comparisons "left is lower than right", one for every target and measure, or states that a table
follows a straight line over depth. A comparison without measurements on both sides is *not measured*: nothing is
interpolated or taken from another step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fine_dist.study.report.measurements import Mean, PublishedClaim, steps_of
from fine_dist.study.report.number_text import number
from fine_dist.study.report.results import Results

MEASURES = {"held_out_loss": "held-out loss", "fd_classifier": "Fréchet distance"}
HELD, NOISE, FAILED, MISSING = "held", "within noise", "did not hold", "not measured"


@dataclass(frozen=True)
class Comparison:
    """Whether `left` is lower than `right` (with `or_equal`, not higher) at one target by one measure."""

    target: int
    measure: str
    left: str
    right: str
    left_value: Mean | None
    right_value: Mean | None
    or_equal: bool = False

    @property
    def held(self) -> bool | None:
        """The result of comparing the means; None: not measured."""
        if self.left_value is None or self.right_value is None:
            return None
        a, b = self.left_value.mean, self.right_value.mean
        return a <= b if self.or_equal else a < b

    @property
    def within_spread(self) -> bool:
        """Whether the difference is smaller than the seeds' spread (root of the summed variances)."""
        if self.left_value is None or self.right_value is None:
            return False
        # Variances of independent means add, and the spread of one seed is 0, so a single seed is never noise.
        noise = math.hypot(self.left_value.spread, self.right_value.spread)
        return abs(self.left_value.mean - self.right_value.mean) < noise

    @property
    def outcome(self) -> str:
        """The verdict. A difference within the spread is noise, unless the claim is "not higher" and it holds."""
        if self.held is None:
            return MISSING
        if self.within_spread and not (self.or_equal and self.held):
            return NOISE
        return HELD if self.held else FAILED

    def text(self) -> str:
        if self.left_value is None or self.right_value is None:
            missing = [name for name, v in ((self.left, self.left_value), (self.right, self.right_value)) if v is None]
            return f"no measurement of {' nor '.join(missing)}"
        a, b = self.left_value.mean, self.right_value.mean
        return f"{number(a)} {'<' if a < b else '>' if a > b else '='} {number(b)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "measure": self.measure,
            "left": self.left,
            "right": self.right,
            "left_mean": self.left_value.mean if self.left_value else None,
            "right_mean": self.right_value.mean if self.right_value else None,
            "held": self.held,
            "within_spread": self.within_spread,
            "verdict": self.outcome,
        }


@dataclass(frozen=True)
class Verdict:
    """One claim and its verdict on the measurements."""

    claim: str
    source: str
    comparisons: list[Comparison] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    """Pairs (name, value) for a claim that does not compare means."""
    note: str = ""
    decided: bool | None = None
    """Whether the claim holds, for a claim with `facts`; None for a claim with comparisons."""

    def of(self, measure: str) -> list[Comparison]:
        return [c for c in self.comparisons if c.measure == measure]

    @property
    def plain(self) -> str:
        """One of held, within noise, did not hold, not measured: the least favorable of its measured comparisons."""
        if self.decided is not None:
            return HELD if self.decided else FAILED
        outcomes = {c.outcome for c in self.comparisons}
        return next((outcome for outcome in (FAILED, NOISE, HELD) if outcome in outcomes), MISSING)

    @property
    def partial(self) -> bool:
        """Whether some comparisons of the held-out loss were not measured."""
        return self.plain != MISSING and any(c.held is None for c in self.of("held_out_loss"))

    @property
    def one_seed(self) -> bool:
        """Whether only one seed was measured, so that nothing is known about the spread."""
        means = [m for c in self.comparisons for m in (c.left_value, c.right_value) if m is not None]
        return bool(means) and all(m.num == 1 for m in means)

    @property
    def outcome(self) -> str:
        partly = " where measured" if self.partial and self.plain == HELD else ""
        return self.plain + partly + (" on one seed" if self.one_seed else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "claim": self.claim,
            "source": self.source,
            "verdict": self.outcome,
            "comparisons": [c.as_json() for c in self.comparisons],
            "facts": dict(self.facts),
            "note": self.note,
        }


def verdicts(results: Results) -> list[Verdict]:
    """Every claim of the results with its verdict, decided from the measurements alone."""
    return [_line(claim, results) if claim.on_a_line else _chain(claim, results) for claim in results.claims]


def compare(results: Results, claim: PublishedClaim, measure: str) -> list[Comparison]:
    """The comparisons of a chain by one measure, target by target."""
    comparisons = []
    for target in results.targets:
        for left, right in zip(claim.chain, claim.chain[1:]):
            a, b = (_end(results, series, at, target, measure) for series, at in (left, right))
            comparisons.append(Comparison(target, measure, a[0], b[0], a[1], b[1], claim.or_equal))
    return comparisons


def _chain(claim: PublishedClaim, results: Results) -> Verdict:
    comparisons = [c for measure in MEASURES for c in compare(results, claim, measure)]
    return Verdict(claim.text, claim.source, comparisons, note=claim.note)


def _end(results: Results, series: str, at: int | str, target: int, measure: str) -> tuple[str, Mean | None]:
    """One side of a comparison: its name, and its mean if it was measured."""
    step = steps_of(at, results.steps)
    return f"{results.name_of(series)} at {step:,} steps", results.mean(series, target, step, measure)


def _line(claim: PublishedClaim, results: Results) -> Verdict:
    fits = {name: linearity(table) for name, table in results.tables.get(claim.on_a_line or "", {}).items()}
    known = {name: fit for name, fit in fits.items() if fit is not None}
    if not known:
        return Verdict(claim.text, claim.source, note="no table has 3 or more layers that differ")
    facts = [(name, f"r {fit.correlation:.2f}, line {fit.r_squared:.0%}") for name, fit in known.items()]
    note = (
        "r: correlation of the first principal component with depth; line: share of the variance over layers that a "
        f"straight line explains. The claim holds when every r is at least {claim.bound:g}, a threshold chosen for "
        f"this report. {claim.note}"
    )
    decided = all(fit.correlation >= claim.bound for fit in known.values())
    return Verdict(claim.text, claim.source, facts=facts, note=note.strip(), decided=decided)


# --- tables over depth -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linearity:
    """How a table [L, R] changes with depth: `score` [L] on its first principal component, the score's correlation with
    depth, and the share of variance that a straight line over depth explains (R²)."""

    mean: np.ndarray
    direction: np.ndarray
    score: np.ndarray
    correlation: float
    r_squared: float


def linearity(table: Any) -> Linearity | None:
    """PCA over the layers of a table [L, R]. None for fewer than 3 layers or a table whose layers are equal."""
    values = np.asarray(table, dtype=np.float64)
    if len(values) < 3 or np.allclose(values, values[0]):
        return None
    mean = values.mean(axis=0)
    centred = values - mean
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    score, direction = left[:, 0] * singular[0], right[0]
    depth = np.linspace(-1, 1, len(values))
    slope = depth @ centred / (depth @ depth)
    # The sign of a singular vector is arbitrary; without a rule, equal runs would have mirrored curves.
    if score @ depth < 0:
        score, direction = -score, -direction
    return Linearity(
        mean,
        direction,
        score,
        float(np.corrcoef(score, depth)[0, 1]),
        float(((depth[:, None] * slope) ** 2).sum() / (centred**2).sum()),
    )
