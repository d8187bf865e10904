"""Numbers to keep for n initialised models, series by series: what they share once, and each model's own."""

from __future__ import annotations

from dataclasses import dataclass

from fine_dist.study.report.results import Results

COUNTS = (1, 10, 100)
"""Numbers of models that storage is told for."""


@dataclass(frozen=True)
class Kept:
    """Of one series, at one depth, before ordinary training (after it every model is stored whole)."""

    series: str
    label: str
    shared: int
    own: int

    def of(self, count: int) -> int:
        """Numbers for so many models."""
        return self.shared + count * self.own


def storage(results: Results) -> list[Kept]:
    """Every series whose targets come from something, at the largest depth it has; first what stores models whole.

    A series without a stage 2 makes its targets from what they come from alone: they have no numbers of their own until
    they are trained. A series whose stage 2 is all its training keeps what that stage trained. A row that stores what
    the row it is called after stores (its bare row) is not told twice.
    """
    if not results.target_params:
        return []
    target = max(results.target_params)
    found = [Kept("", "stored whole", 0, results.target_params[target])]
    for series, ancestor in results.ancestors.items():
        depths = [row.target for row in results.rows if row.series == series]
        if not ancestor.stored or not depths:
            continue
        last = max(depths)
        initial = [row.stored for row in results.at(series, last, 0) if row.stage == "init"]
        if initial and not max(initial):
            continue  # it was not counted
        end = results.at(series, last, results.trained_steps(series, last))
        final = [row.stored for row in end if row.steps_train and row.stored != results.target_params.get(last, 0)]
        kept = Kept(series, results.label(series), ancestor.stored, max(initial or final or [0]))
        if not any((k.shared, k.own) == (kept.shared, kept.own) and kept.label.startswith(k.label) for k in found):
            found.append(kept)
    return found
