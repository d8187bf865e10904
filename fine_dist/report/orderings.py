"""Which of the paper's orderings hold on these rows (FINE, arXiv 2409.19289), each by its own comparison of means.

A claim is a chain of comparisons "left is lower than right", each at every depth and for each measure. A comparison
that lacks a row is *not measured*: nothing is interpolated, and nothing is borrowed from another step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fine_dist.report.results import Mean, Results, label

MEASURES = {"held_out_loss": "held-out loss", "frechet": "Fréchet distance"}
NEAR_LINEAR = 0.9
"""Sigma is called close to linear in depth when its first principal component follows depth with a correlation of at
least this, in every kind. The paper shows a picture and no number; this one is ours."""


@dataclass(frozen=True)
class Comparison:
    """`left` lower than `right` (`or_equal`: no higher) at one depth by one measure; `held` None: not measured."""

    target: int
    measure: str
    left: str
    right: str
    left_value: Mean | None
    right_value: Mean | None
    or_equal: bool = False

    @property
    def held(self) -> bool | None:
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

    def text(self) -> str:
        if self.left_value is None or self.right_value is None:
            missing = [name for name, v in ((self.left, self.left_value), (self.right, self.right_value)) if v is None]
            return f"no measurement of {' nor '.join(missing)}"
        sign = "<" if self.left_value.mean < self.right_value.mean else ">"
        sign = "=" if self.left_value.mean == self.right_value.mean else sign
        return f"{number(self.left_value.mean)} {sign} {number(self.right_value.mean)}"


@dataclass(frozen=True)
class Verdict:
    """One claim on this run. `held` None: not measured."""

    claim: str
    source: str
    comparisons: list[Comparison] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(what, value) where a claim is no comparison of two means."""
    note: str = ""
    decided: bool | None = None

    def of(self, measure: str) -> list[Comparison]:
        return [c for c in self.comparisons if c.measure == measure]

    def by(self, measure: str) -> bool | None:
        """Held by this measure at every depth where it was measured."""
        known = [c.held for c in self.of(measure) if c.held is not None]
        return all(known) if known else None

    @property
    def held(self) -> bool | None:
        known = [c.held for c in self.comparisons if c.held is not None]
        return all(known) if known else self.decided

    @property
    def partial(self) -> bool:
        """Some comparisons by the held-out loss lack a row."""
        return self.held is not None and any(c.held is None for c in self.of("held_out_loss"))

    @property
    def word(self) -> str:
        held = {True: "held", False: "did not hold", None: "not measured"}[self.held]
        return held + (" where measured" if self.partial and self.held else "")

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                "target": c.target,
                "measure": c.measure,
                "left": c.left,
                "right": c.right,
                "left_mean": c.left_value.mean if c.left_value else None,
                "right_mean": c.right_value.mean if c.right_value else None,
                "held": c.held,
                "within_spread": c.within_spread,
            }
            for c in self.comparisons
        ]
        return {
            "claim": self.claim,
            "source": self.source,
            "verdict": self.word,
            "comparisons": rows,
            "facts": dict(self.facts),
            "note": self.note,
        }


@dataclass(frozen=True)
class _Claim:
    """A chain of series, each lower than the next. Steps are a formula of N (FINE's training steps) and I (its
    initialisation's)."""

    text: str
    source: str
    chain: tuple[tuple[str, str], ...]
    or_equal: bool = False


def _sigma_chain(at: str) -> tuple[tuple[str, str], ...]:
    return tuple((series, at) for series in ("fine", "fine:linear", "fine:identical", "fine:random"))


CLAIMS = (
    _Claim(
        "FINE is better than scratch at equal steps after initialisation", "ordering 1", (("fine", "N"), ("he", "N"))
    ),
    _Claim("FINE after N steps is no worse than scratch after 3N", "ordering 4", (("fine", "N"), ("he", "3N")), True),
    _Claim(
        "FINE is better than TLEG, and TLEG than scratch", "ordering 1", (("fine", "N"), ("tleg", "N"), ("he", "N"))
    ),
    _Claim(
        "Before any training: trained sigma is better than linear, linear than identical, identical than random",
        "ordering 2",
        _sigma_chain("0"),
    ),
    _Claim(
        "After N steps: trained sigma is better than linear, linear than identical, identical than random",
        "ordering 2",
        _sigma_chain("N"),
    ),
    _Claim(
        "Shared factors are better than per-layer SVD, and that than scratch",
        "ordering 3",
        (("fine", "N"), ("svd", "N"), ("he", "N")),
    ),
    _Claim("FINE is better than scratch at equal total steps", "control", (("fine", "N"), ("he", "N+I"))),
    _Claim(
        "FINE is better than trained sigma over frozen random factors",
        "control",
        (("fine", "N"), ("random_genes", "N")),
    ),
    _Claim("FINE is better than copying only what is outside the blocks", "control", (("fine", "N"), ("outside", "N"))),
)
_LINEAR = "Learned sigma is close to linear in depth"


def verdicts(results: Results) -> list[Verdict]:
    """Every claim, decided from the rows alone."""
    found = [Verdict(c.text, c.source, _compare(c, results)) for c in CLAIMS]
    return [*found[:6], _linear_verdict(results), *found[6:]]


def step_of(formula: str, budget: int, init: int) -> int:
    return {"0": 0, "N": budget, "3N": 3 * budget, "N+I": budget + init}[formula]


def _compare(claim: _Claim, results: Results) -> list[Comparison]:
    found = []
    for measure in MEASURES:
        for target in results.targets:
            for (left, left_at), (right, right_at) in zip(claim.chain, claim.chain[1:]):
                a, b = (
                    _end(results, series, at, target, measure) for series, at in ((left, left_at), (right, right_at))
                )
                found.append(Comparison(target, measure, a[0], b[0], a[1], b[1], claim.or_equal))
    return found


def _end(results: Results, series: str, at: str, target: int, measure: str) -> tuple[str, Mean | None]:
    """One side of a comparison: what it is called, and its mean if it was measured."""
    budget = results.budget(target)
    if budget is None and at != "0":
        return f"{label(series)} at {at}", None
    step = step_of(at, budget or 0, results.init_steps(target))
    return f"{label(series)} at {step:,} steps", results.mean(series, target, step, measure)


# --- sigma over depth ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linearity:
    """How a kind's sigma [L, R] moves with depth: `score` [L] on its first principal component, the share of variance
    that component explains, its correlation with depth, and the share a straight line in depth explains (R²)."""

    mean: np.ndarray
    direction: np.ndarray
    score: np.ndarray
    explained: float
    correlation: float
    r_squared: float


def linearity(table: Any) -> Linearity | None:
    """PCA over layers of sigma [L, R]. None for fewer than 3 layers or a sigma that does not move."""
    sigma = np.asarray(table, dtype=np.float64)
    if len(sigma) < 3 or np.allclose(sigma, sigma[0]):
        return None
    mean = sigma.mean(axis=0)
    centred = sigma - mean
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    score, direction = left[:, 0] * values[0], right[0]
    depth = np.linspace(-1, 1, len(sigma))
    slope = depth @ centred / (depth @ depth)
    if score @ depth < 0:
        score, direction = -score, -direction
    return Linearity(
        mean,
        direction,
        score,
        float(values[0] ** 2 / (values**2).sum()),
        float(np.corrcoef(score, depth)[0, 1]),
        float(((depth[:, None] * slope) ** 2).sum() / (centred**2).sum()),
    )


def _linear_verdict(results: Results) -> Verdict:
    found = {kind: linearity(table) for kind, table in results.sigmas.get("learngene", {}).items()}
    known = {kind: fit for kind, fit in found.items() if fit is not None}
    if not known:
        return Verdict(_LINEAR, "ordering 5", note="no sigma of a learngene with 3 layers or more")
    facts = [(kind, f"r {fit.correlation:.2f}, line {fit.r_squared:.0%}") for kind, fit in known.items()]
    note = (
        "r: correlation of sigma’s first principal component with depth; line: share of sigma’s variance over layers "
        f"that a straight line explains. Held when every r is at least {NEAR_LINEAR}, a bound of this report: the "
        "paper shows a picture and names none. Stage 1 starts sigma on a line in depth (all kinds but adaln), so this "
        "says that training keeps it near one, not that it finds one."
    )
    decided = all(fit.correlation >= NEAR_LINEAR for fit in known.values())
    return Verdict(_LINEAR, "ordering 5", facts=facts, note=note, decided=decided)


# --- the arithmetic of cost ----------------------------------------------------------------------------------------


def arithmetic(results: Results) -> list[tuple[str, str]]:
    """What "fewer steps, less storage" comes to here: (what, sentence), computed from steps and counts of numbers."""
    lines = []
    budgets = {t: results.budget(t) for t in results.targets}
    known = {t: n for t, n in budgets.items() if n is not None}
    if known and results.ancestor:
        ours = results.ancestor.steps + sum(n + results.init_steps(t) for t, n in known.items())
        theirs = 3 * sum(known.values())
        lines.append(
            (
                "steps",
                f"{len(known)} targets: {results.ancestor.steps:,} steps once, then {ours - results.ancestor.steps:,} "
                f"for all targets = {ours:,}; scratch with 3N each: {theirs:,}, {theirs / ours:.2f} times that. "
                "The first part is paid once, however many targets follow.",
            )
        )
    full = sum(results.target_params.get(t, 0) for t in results.targets)
    if full and results.ancestor and results.ancestor.learngene_params:
        gene = results.ancestor.learngene_params
        lines.append(
            (
                "storage",
                f"the learngene holds {gene:,} numbers, the {len(results.targets)} full models {full:,} "
                f"({full / gene:.2f} times as many)",
            )
        )
    return lines


def number(value: float, like: float | None = None) -> str:
    """Four decimals below 1, else four significant digits; `like`: with as many decimals as that number has."""
    size = abs(value if like is None else like)
    return f"{value:.4f}" if size < 1 else f"{value:.{max(0, 3 - int(math.log10(size)))}f}"
