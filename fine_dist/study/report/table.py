"""The table of the report, made once and shown twice: on the page and in the terminal."""

from __future__ import annotations

from typing import NamedTuple

from fine_dist.study.report.cost_table import short
from fine_dist.study.report.results import Mean, Results, number


class Line(NamedTuple):
    """One state of one series at one depth, and its cells in the order of the heads."""

    target: int
    series: str
    step: int
    cells: list[str]


class Table(NamedTuple):
    heads: list[str]
    lines: list[Line]

    def without(self, *names: str) -> Table:
        """Fewer columns."""
        kept = [i for i, head in enumerate(self.heads) if head not in names]
        return Table(
            [self.heads[i] for i in kept],
            [line._replace(cells=[line.cells[i] for i in kept]) for line in self.lines],
        )


def table(results: Results) -> Table:
    """A line a depth, series and milestone that was measured; columns without any number are left out."""
    heads = ["depth", "method", "init\nsteps", "train\nsteps", "held-out loss", "Fréchet", "FLOPs", "stored", "seconds"]
    lines = [
        Line(target, series, step, _cells(results, series, target, step))
        for target in results.targets
        for series in results.series
        for step in milestones(results, target)
        if results.mean(series, target, step)
    ]
    used = [i for i in range(len(heads)) if i in (0, 1, 3) or any(line.cells[i] not in ("–", "0") for line in lines)]
    return Table([heads[i] for i in used], [line._replace(cells=[line.cells[i] for i in used]) for line in lines])


def milestones(results: Results, target: int) -> list[int]:
    """Training steps that the table shows: none, N, N and what initialisation took, each series' last (else: both
    ends)."""
    if results.budget:
        last = {results.trained_steps(series, target) for series in results.series}
        total = results.budget + results.init_steps(results.main, target)
        return sorted({0, results.budget, total, *(step for step in last if step >= results.budget)})
    ends = [list(results.points(series, target)) for series in results.series]
    return sorted({step for steps in ends if steps for step in (steps[0], steps[-1])})


def cell(mean: Mean | None) -> str:
    """`0.1105 ± 0.0004`, without a spread for one seed; a dash where nothing was measured."""
    if mean is None:
        return "–"
    return number(mean.mean) + (f" ± {number(mean.spread, like=mean.mean)}" if mean.num > 1 else "")


def _cells(results: Results, series: str, target: int, step: int) -> list[str]:
    rows = results.at(series, target, step)
    seconds = results.seconds(series, target, step)
    return [
        str(target),
        results.label(series),
        f"{max(r.steps_init for r in rows):,}",
        f"{step:,}",
        cell(results.mean(series, target, step)),
        cell(results.mean(series, target, step, "frechet")),
        _largest([r.flops for r in rows]),
        _largest([float(r.stored) for r in rows]),
        "–" if not seconds else f"{seconds:.1f}",
    ]


def _largest(values: list[float]) -> str:
    """Costs are equal over seeds; rows that were measured without a cost of their own count as nothing."""
    return short(max(values)) if max(values) else "–"
