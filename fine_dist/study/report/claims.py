"""Claims as data, and which of them hold on measured rows, each by its own comparison of means.

A claim is a chain of comparisons "left is lower than right", each at every target and for each measure, or it says
that a table follows depth on a line. A comparison that lacks a row is *not measured*: nothing is interpolated, and
nothing is borrowed from another step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fine_dist.study.report.depth_curves import linearity
from fine_dist.study.report.formula import steps_of
from fine_dist.study.report.results import Claim, Mean, Results, number

MEASURES = {"held_out_loss": "held-out loss", "frechet": "Fréchet distance", "fd_efflite": "FD-EffLite"}
HELD, NOISE, FAILED, MISSING = "held", "within noise", "did not hold", "not measured"


@dataclass(frozen=True)
class Comparison:
    """`left` lower than `right` (`or_equal`: no higher) at one target by one measure."""

    target: int
    measure: str
    left: str
    right: str
    left_value: Mean | None
    right_value: Mean | None
    or_equal: bool = False

    @property
    def held(self) -> bool | None:
        """By the means alone; none: not measured."""
        if self.left_value is None or self.right_value is None:
            return None
        a, b = self.left_value.mean, self.right_value.mean
        return a <= b if self.or_equal else a < b

    @property
    def within_spread(self) -> bool:
        """The difference is smaller than the seeds' own (root of the summed variances)."""
        if self.left_value is None or self.right_value is None:
            return False
        noise = math.hypot(self.left_value.spread, self.right_value.spread)
        return abs(self.left_value.mean - self.right_value.mean) < noise

    @property
    def word(self) -> str:
        """A difference within the seeds' spread decides nothing, unless "no higher" is claimed and holds."""
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
            "verdict": self.word,
        }


@dataclass(frozen=True)
class Verdict:
    """One claim on these rows."""

    claim: str
    source: str
    comparisons: list[Comparison] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(what, value) where a claim is no comparison of two means."""
    note: str = ""
    decided: bool | None = None
    """By the facts, where they are what decides."""

    def of(self, measure: str) -> list[Comparison]:
        return [c for c in self.comparisons if c.measure == measure]

    @property
    def plain(self) -> str:
        """One of held, within noise, did not hold, not measured: the least favourable of its measured comparisons."""
        if self.decided is not None:
            return HELD if self.decided else FAILED
        words = {c.word for c in self.comparisons}
        return next((word for word in (FAILED, NOISE, HELD) if word in words), MISSING)

    @property
    def partial(self) -> bool:
        """Some comparisons by the held-out loss lack a row."""
        return self.plain != MISSING and any(c.held is None for c in self.of("held_out_loss"))

    @property
    def one_seed(self) -> bool:
        """No comparison has a second seed, so nothing is known of the spread."""
        means = [m for c in self.comparisons for m in (c.left_value, c.right_value) if m is not None]
        return bool(means) and all(m.num == 1 for m in means)

    @property
    def word(self) -> str:
        partly = " where measured" if self.partial and self.plain == HELD else ""
        return self.plain + partly + (" on one seed" if self.one_seed else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "claim": self.claim,
            "source": self.source,
            "verdict": self.word,
            "comparisons": [c.as_json() for c in self.comparisons],
            "facts": dict(self.facts),
            "note": self.note,
        }


def verdicts(results: Results) -> list[Verdict]:
    """Every claim of the results, decided from the rows alone."""
    return [_line(claim, results) if claim.on_a_line else _chain(claim, results) for claim in results.claims]


def compare(results: Results, claim: Claim, measure: str) -> list[Comparison]:
    """A chain's comparisons by one measure, target by target."""
    found = []
    for target in results.targets:
        for left, right in zip(claim.chain, claim.chain[1:]):
            a, b = (_end(results, series, at, target, measure) for series, at in (left, right))
            found.append(Comparison(target, measure, a[0], b[0], a[1], b[1], claim.or_equal))
    return found


def _chain(claim: Claim, results: Results) -> Verdict:
    comparisons = [c for measure in MEASURES for c in compare(results, claim, measure)]
    return Verdict(claim.text, claim.source, comparisons, note=claim.note)


def _end(results: Results, series: str, at: int | str, target: int, measure: str) -> tuple[str, Mean | None]:
    """One side of a comparison: what it is called, and its mean if it was measured."""
    step = steps_of(at, results.steps)
    return f"{results.label(series)} at {step:,} steps", results.mean(series, target, step, measure)


def _line(claim: Claim, results: Results) -> Verdict:
    found = {name: linearity(table) for name, table in results.tables.get(claim.on_a_line or "", {}).items()}
    known = {name: fit for name, fit in found.items() if fit is not None}
    if not known:
        return Verdict(claim.text, claim.source, note="no table of 3 layers or more that moves")
    facts = [(name, f"r {fit.correlation:.2f}, line {fit.r_squared:.0%}") for name, fit in known.items()]
    note = (
        "r: correlation of the first principal component with depth; line: share of the variance over layers that a "
        f"straight line explains. Held when every r is at least {claim.bound:g}, a bound of this report. {claim.note}"
    )
    decided = all(fit.correlation >= claim.bound for fit in known.values())
    return Verdict(claim.text, claim.source, facts=facts, note=note.strip(), decided=decided)
