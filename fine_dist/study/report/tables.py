"""The tables of a report, computed from the measurements; `render` writes them as HTML, text and Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fine_dist.study.report.measurements import Mean
from fine_dist.study.report.number_text import mean_text, number, plain, short
from fine_dist.study.report.results import Results
from fine_dist.study.report.text import about, left_out
from fine_dist.study.report.worth import COUNTS, break_even, cheapest_lines, saved_steps

DASH = "–"


class TableCell(NamedTuple):
    """The text of a cell, and the value by which the page sorts its column."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class TableRow:
    """One row. The page hides and shows rows by `series`; `strong` rows are bold."""

    cells: list[TableCell]
    series: str = ""
    group: int | str = ""
    strong: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table with column heads, rows and a caption. The first `text_columns` columns are left-aligned."""

    heads: list[str]
    rows: list[TableRow] = field(default_factory=list)
    caption: str = ""
    text_columns: int = 1

    def without_empty_columns(self, keep: int) -> ReportTable:
        """The same table without the columns, after the first `keep`, that hold nothing but dashes and zeros."""
        used = [
            i for i in range(len(self.heads)) if i < keep or any(r.cells[i].text not in (DASH, "0") for r in self.rows)
        ]
        return self.with_columns(used)

    def without(self, *heads: str) -> ReportTable:
        """The same table without some columns."""
        return self.with_columns([i for i, head in enumerate(self.heads) if head not in heads])

    def with_columns(self, columns: list[int]) -> ReportTable:
        """The same table with some of its columns, by index."""
        rows = [TableRow([r.cells[i] for i in columns], r.series, r.group, r.strong) for r in self.rows]
        return ReportTable([self.heads[i] for i in columns], rows, self.caption, self.text_columns)


def mean_cell(mean: Mean | None) -> TableCell:
    """`0.1105 ± 0.0004`, without a spread for one seed; a dash where nothing was measured."""
    return TableCell(DASH) if mean is None else TableCell(mean_text(mean), mean.mean)


def count_cell(value: float | None, unit: bool = False) -> TableCell:
    """`1,500`, or `1.5 K` with a unit; a dash for None."""
    if value is None:
        return TableCell(DASH)
    return TableCell(short(value) if unit else f"{value:,.0f}", value)


def _main_series(results: Results) -> list[str]:
    """Every published series that is not a variant of another."""
    return [series for series in results.series if ":" not in series]


# --- quality ---------------------------------------------------------------------------------------------------------


def rows(results: Results) -> ReportTable:
    """One row per depth, series and milestone that was measured."""
    heads = ["depth", "method", "init steps", "train steps", "held-out loss", "Fréchet distance", "accuracy", "FLOPs",
             "stored", "seconds"]  # fmt: skip
    body = []
    for target in results.targets:
        for series in results.series:
            for step in milestones(results, target):
                mean = results.mean(series, target, step)
                if mean is not None:
                    body.append(_state_row(results, series, target, step))
    spread = "Mean ± standard deviation over seeds" if len(results.seeds) > 1 else "One seed"
    caption = (
        f"Train steps follow initialization. {spread}. FLOPs and seconds are those of one target's own stages; the "
        "cost that all targets share is in the cost table. Stored: numbers in the target's own file."
    )
    return ReportTable(heads, body, caption, text_columns=2).without_empty_columns(5)


def _state_row(results: Results, series: str, target: int, step: int) -> TableRow:
    at = results.at(series, target, step)
    seconds = results.seconds(series, target, step)
    cells = [
        TableCell(str(target), target),
        TableCell(results.name_of(series), results.name_of(series)),
        count_cell(max(m.steps_init for m in at)),
        count_cell(step),
        mean_cell(results.mean(series, target, step)),
        mean_cell(results.mean(series, target, step, "fd_classifier")),
        mean_cell(results.mean(series, target, step, "accuracy")),
        count_cell(max(m.flops for m in at) or None, unit=True),
        count_cell(max(m.stored for m in at) or None, unit=True),
        TableCell(f"{seconds:.1f}", seconds) if seconds else TableCell(DASH),
    ]
    return TableRow(cells, series, target, series == results.main)


def milestones(results: Results, target: int) -> list[int]:
    """Training steps that the table shows: 0, N, N plus the main series' initialization, and each series' last step."""
    if results.budget:
        last = {results.trained_steps(series, target) for series in results.series}
        total = results.budget + results.init_steps(results.main, target)
        ended = {step for series in results.series for step in results.ends(series, target)}
        # with a decaying schedule, the middle of a run does not predict the loss of a run that ends there
        middle = set() if ended else {total}
        return sorted({0, results.budget, *middle, *ended, *(step for step in last if step >= results.budget)})
    ends = [list(results.points(series, target)) for series in results.series]
    return sorted({step for steps in ends if steps for step in (steps[0], steps[-1])})


def quality(results: Results) -> ReportTable:
    """One row per series and milestone, one column per depth: held-out loss and Fréchet distance."""
    heads, columns = ["method", "train steps"], []
    for target in results.targets:
        columns.append((target, "held_out_loss"))
        heads.append(f"loss, {target} layers")
        if any(m.target == target and m.fd_classifier is not None for m in results.measurements):
            columns.append((target, "fd_classifier"))
            heads.append(f"Fréchet, {target} layers")
    heads += ["tuned"] if results.tuning else []
    body = []
    for series in _main_series(results):
        for step in sorted({step for target in results.targets for step in results.reported_steps(series, target)}):
            cells = [TableCell(results.name_of(series)), count_cell(step)]
            cells += [mean_cell(results.mean(series, target, step, key)) for target, key in columns]
            cells += [TableCell(_tuned(results, series))] if results.tuning else []
            body.append(TableRow(cells, series, strong=series == results.main))
    return ReportTable(heads, body, about(results))


def ranking(results: Results) -> ReportTable:
    """Every series after N steps, best first at the depth that most series have, with its FLOPs."""
    n = results.budget or 0
    losses = {s: [results.mean(s, target, n) for target in results.targets] for s in _main_series(results)}
    counts = [sum(means[i] is not None for means in losses.values()) for i in range(len(results.targets))]
    column = counts.index(max(counts, default=0)) if counts else 0
    ranked = sorted((mean.mean, s) for s, means in losses.items() if means and (mean := means[column]) is not None)
    body = []
    for _, series in ranked:
        [at, *_] = results.at(series, results.targets[column], n)
        cells = [TableCell(results.name_of(series)), *map(mean_cell, losses[series])]
        cells += [count_cell(at.flops_condense, unit=True), count_cell(at.flops, unit=True)]
        body.append(TableRow(cells, series, strong=series == results.main))
    heads = ["method", *(f"loss, {t} layers" for t in results.targets), "shared FLOPs", "own FLOPs"]
    deep = f" FLOPs are for {results.targets[column]} layers." if results.targets else ""
    return ReportTable(heads, body, about(results) + deep)


# --- costs -----------------------------------------------------------------------------------------------------------


def costs(results: Results) -> ReportTable:
    """The cost of each series at its last step, of its own stages and of the stages that its targets share."""
    heads = "method|layers|shared steps|init steps|train steps|own samples|shared FLOPs|own FLOPs|shared seconds"
    heads += "|own seconds|stored|trained"
    body = []
    for series in _main_series(results):
        for target in results.targets:
            at = results.at(series, target, results.trained_steps(series, target))
            if at:
                own, shared = (sum(getattr(m, key) for m in at) / len(at) for key in ("seconds", "seconds_condense"))
                m = at[0]
                counts = (target, m.steps_condense, m.steps_init, m.steps_train, m.samples)
                cells = [TableCell(results.name_of(series)), *map(count_cell, counts)]
                cells += [count_cell(m.flops_condense, unit=True), count_cell(m.flops, unit=True)]
                cells += [count_cell(shared), count_cell(own), count_cell(m.stored), count_cell(m.trained)]
                body.append(TableRow(cells, series, strong=series == results.main))
    caption = "Shared: stage 1, its teacher and the training of ancestors, paid once however many targets follow."
    return ReportTable(heads.split("|"), body, caption)


class StoredNumbers(NamedTuple):
    """Numbers to store for the initialized targets of a series: those that all share, and those of each target."""

    series: str
    label: str
    shared: int
    own: int

    def total(self, count: int) -> int:
        """Numbers for `count` targets."""
        return self.shared + count * self.own


def storage_of(results: Results) -> list[StoredNumbers]:
    """Storage of every series with a parent at its largest depth, before stage 3; the first row is for dense models.

    Without a stage 2 targets follow from the parent alone, so that a target has no numbers of its own before training.
    A series whose stage 2 is its only training stores the parameters that it trained. Rows that differ only in the
    shell of stage 3 store the same numbers and appear once.
    """
    if not results.target_params:
        return []
    target = max(results.target_params)
    stored = [StoredNumbers("", "dense models", 0, results.target_params[target])]
    for series, ancestor in results.ancestors.items():
        depths = [m.target for m in results.measurements if m.series == series]
        if not ancestor.stored or not depths or series not in results.series:
            continue
        last = max(depths)
        initial = [m.stored for m in results.at(series, last, 0) if m.stage == "init" and m.steps_init]
        end = results.at(series, last, results.trained_steps(series, last))
        final = [m.stored for m in end if m.steps_train and m.stored != results.target_params.get(last, 0)]
        row = StoredNumbers(series, results.name_of(series), ancestor.stored, max(initial or final or [0]))
        if not any((k.shared, k.own) == (row.shared, row.own) and row.label.startswith(k.label) for k in stored):
            stored.append(row)
    return stored


def storage(results: Results) -> ReportTable:
    """Numbers to keep for n initialized models of the largest depth."""
    stored = storage_of(results)
    body = [
        TableRow([TableCell(k.label), *map(count_cell, (k.shared, k.own, *map(k.total, COUNTS)))], k.series)
        for k in stored
        if len(stored) > 1
    ]
    caption = (
        f"Numbers to keep for n initialized models of {max(results.targets, default=0)} layers, before stage 3: those "
        "shared by all models, and each model's own."
    )
    return ReportTable(["method", "shared", "own", *map(_models, COUNTS)], body, caption)


def totals(results: Results) -> ReportTable:
    """Total FLOPs until n models reach the quality of the baseline, with and without a free ancestor."""
    costs = break_even(results)
    body = []
    for line in costs.lines if costs else []:
        label = results.name_of(line.series) + (", free ancestor" if line.free else "")
        cells = [TableCell(label), TableCell(f"{line.steps:,.0f}", line.steps)]
        cells += [count_cell(line.total(n), unit=True) for n in COUNTS]
        body.append(TableRow(cells, line.series, strong=line.series == results.main))
    sentences = [costs.caption(results), *cheapest_lines(results, costs)] if costs else []
    return ReportTable(["method", "train steps", *map(_models, COUNTS)], body, " ".join(sentences))


def _models(count: int) -> str:
    return f"{count} model{'s' if count > 1 else ''}"


def saved(results: Results) -> ReportTable:
    """Steps of training from scratch that each initialization saves, by depth and training length."""
    lines = saved_steps(results)
    lengths = sorted({length for line in lines for length in line.saved})
    body = []
    for line in lines:
        cells = [TableCell(results.name_of(line.series)), TableCell(str(line.target), line.target)]
        cells += [TableCell(line.text(n), line.saved[n].steps) if n in line.saved else TableCell(DASH) for n in lengths]
        body.append(TableRow(cells, line.series, line.target, line.series == results.main))
    caption = (
        f"Steps of {results.name_of(results.baseline)} after which its held-out loss equals that of the row after its "
        "own training steps, minus all steps of the target itself (initialization included). Interpolated between "
        "measured lengths; > means that the baseline never got there in the steps it had. Shared cost is not "
        "subtracted."
    )
    return ReportTable(["method", "layers", *(f"after {n:,} steps" for n in lengths)], body, caption)


def tuning(results: Results) -> ReportTable:
    """All tuning values of each series with their losses; the chosen value is marked."""
    points = list(dict.fromkeys(plain(row["values"]) for tried in results.tuning.values() for row in tried))
    points.sort(key=lambda text: [float(word) if _is_number(word) else 0.0 for word in text.split()])
    body = []
    for series, tried in results.tuning.items():
        losses = {plain(row["values"]): row for row in tried}
        cells = [TableCell(results.name_of(series))]
        for point in points:
            row = losses.get(point)
            loss = row["held_out_loss"] if row else None
            mark = " *" if row and row["chosen"] else ""
            cells.append(TableCell((DASH if loss is None else number(loss)) + mark, loss))
        body.append(TableRow(cells, series))
    caption = (
        "Held-out loss on the tuning seed, which is not reported. Every series tries the same grid; the grid of a "
        f"series is extended while its best value lies at an end. * marks the value used. {left_out(results)}"
    )
    return ReportTable(["method", *points], body, caption.strip())


def _tuned(results: Results, series: str) -> str:
    values = results.tuned_values(series)
    return ", ".join(f"{key.rpartition('.')[2]} {plain(value)}" for key, value in values.items()) or DASH


def _is_number(word: str) -> bool:
    try:
        float(word.rstrip(","))
    except ValueError:
        return False
    return True


TABLES: dict[str, Callable[[Results], ReportTable]] = {
    "rows": rows,
    "quality": quality,
    "ranking": ranking,
    "costs": costs,
    "storage": storage,
    "break_even": totals,
    "saved": saved,
    "tuning": tuning,
}
"""Tables by the name that documents and sections use."""
