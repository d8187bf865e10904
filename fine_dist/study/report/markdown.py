"""Results as Markdown: every series in a row, costs, storage for n models, and the verdicts.

`python -m fine_dist.study.report.markdown [--brief] NAME FOLDER... FILE` puts the tables of some reports' folders into
a document, between its comments `<!-- NAME table: begin -->` and `<!-- NAME table: end -->`; `--brief`: one table
each, of quality after N steps beside all that was spent. `--png FILE --series NAME,...` also draws the first report's
curves, of some series.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fine_dist.core.errors import guard
from fine_dist.core.files import write_atomic
from fine_dist.study.report import summary_png
from fine_dist.study.report.claims import MEASURES, MISSING, verdicts
from fine_dist.study.report.cost_table import short
from fine_dist.study.report.readme import fill
from fine_dist.study.report.results import Results, read_results
from fine_dist.study.report.storage import COUNTS, storage
from fine_dist.study.report.table import cell
from fine_dist.study.report.tuning import MARK, at_an_end, chosen, ends

HEADS = (
    "method|layers|steps before|init steps|train steps|own samples|FLOPs before|own FLOPs|seconds before|own seconds|"
    "stored|trained"
)


def markdown(results: Results) -> str:
    """All of it, under a heading."""
    parts = [f"## {results.title}", "", about(results), "", quality(results), costs(results), stored(results)]
    return "\n".join([*parts, decided(results)])


def about(results: Results) -> str:
    """What was run, in a sentence."""
    seeds = ", ".join(map(str, results.seeds))
    steps = ", ".join(f"{name} = {value:,}" for name, value in results.steps.items())
    made = f" Made by `{results.command}`." if results.command else ""
    classifier = (
        f" Fréchet distances: {results.frechet_samples:,} samples, features of a classifier that gets "
        f"{results.classifier_accuracy:.1%} of held-out images right."
        if results.classifier_accuracy is not None and results.frechet_samples
        else ""
    )
    where = f"On {results.dataset}; s" if results.dataset else "S"
    tuned = ends(results)
    return f"{where}eeds {seeds}; {steps}. Lower is better.{classifier}{' ' * bool(tuned)}{tuned}{made}"


def quality(results: Results) -> str:
    """Held-out loss and Fréchet distance of every series after N steps, and at its other milestones."""
    distances = [
        (key, name)
        for key, name in (("frechet", "Fréchet"), ("fd_efflite", "FD-EffLite"))
        if any(getattr(row, key) is not None for row in results.rows)
    ]
    heads = ["method", "steps"]
    columns: list[tuple[int, str]] = []
    for target in results.targets:
        measured = [(key, name) for key, name in distances if _measured(results, target, key)]
        columns += [(target, "held_out_loss"), *((target, key) for key, _ in measured)]
        heads += [f"loss, {target} layers", *(f"{name}, {target} layers" for _, name in measured)]
    lines = _heads([*heads, *(["tuned"] if results.tuning else [])])
    for series, step in _states(results):
        cells = [results.label(series), f"{step:,}"]
        cells += [cell(results.mean(series, target, step, key)) for target, key in columns]
        if results.tuning:
            cells.append(_chosen(results, series))
        lines.append(_line(cells))
    return "\n".join([*lines, ""])


def brief(results: Results) -> str:
    """One table: the loss of every series after N steps, the best of the depth that most have first, and its FLOPs."""
    at = results.budget or 0
    found = {series: [results.mean(series, target, at) for target in results.targets] for series in _series(results)}
    column = max(range(len(results.targets)), key=lambda i: sum(means[i] is not None for means in found.values()))
    ranked = sorted((mean.mean, series) for series, means in found.items() if (mean := means[column]) is not None)
    heads = ["method", *(f"loss, {target} layers" for target in results.targets), "FLOPs before", "own FLOPs"]
    lines = _heads(heads)
    for _, series in ranked:
        row = results.at(series, results.targets[column], at)[0]
        name = f"**{results.label(series)}**" if series == results.main else results.label(series)
        lines.append(_line([name, *map(cell, found[series]), short(row.flops_condense), short(row.flops)]))
    said = f"{about(results)} FLOPs of {results.targets[column]} layers."
    return "\n".join([f"**{results.title}**", "", said, "", *lines, ""])


def _measured(results: Results, target: int, measure: str) -> bool:
    return any(row.target == target and getattr(row, measure) is not None for row in results.rows)


def costs(results: Results) -> str:
    """What each series has spent at its last step: own steps, samples and FLOPs, what came before, seconds, numbers."""
    lines = _heads(HEADS.split("|"))
    for series in _series(results):
        for target in results.targets:
            rows = results.at(series, target, results.trained_steps(series, target))
            if not rows:
                continue
            mean = {key: sum(getattr(r, key) for r in rows) / len(rows) for key in ("seconds", "seconds_condense")}
            row = rows[0]
            lines.append(
                _line(
                    [
                        results.label(series), str(target), f"{row.steps_condense:,}", f"{row.steps_init:,}",
                        f"{row.steps_train:,}", f"{row.samples:,}", short(row.flops_condense), short(row.flops),
                        f"{mean['seconds_condense']:.0f}", f"{mean['seconds']:.0f}", f"{row.stored:,}",
                        f"{row.trained:,}",
                    ]
                )
            )  # fmt: skip
    return "\n".join([*lines, ""])


def stored(results: Results) -> str:
    """Numbers to keep for n initialised models of the largest depth."""
    found = storage(results)
    if not found:
        return ""
    lines = _heads(["method", "shared", "own", *(f"{n} models" for n in COUNTS)])
    for kept in found:
        cells = [kept.label, f"{kept.shared:,}", f"{kept.own:,}", *(f"{kept.of(n):,}" for n in COUNTS)]
        lines.append(_line(cells))
    title = f"Numbers to keep for n initialised models of {max(results.targets)} layers:"
    return "\n".join([title, "", *lines, ""])


def decided(results: Results) -> str:
    """Each claim and its verdict, with the comparisons behind it."""
    lines = ["Verdicts:", ""]
    for verdict in verdicts(results):
        lines.append(f"- {verdict.claim}: **{verdict.word}** ({verdict.source})")
        if verdict.plain == MISSING:
            continue
        for measure, name in MEASURES.items():
            told = [f"{c.target} layers {c.text()} ({c.word})" for c in verdict.of(measure) if c.held is not None]
            lines += [f"  - {name}: {'; '.join(told)}"] if told else []
        lines += [f"  - {what}: {value}" for what, value in verdict.facts]
        lines += [f"  - {verdict.note}"] if verdict.note else []
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite a named place in a document from reports' folders."""

    def body() -> int:
        parser = argparse.ArgumentParser(prog="python -m fine_dist.study.report.markdown", description=__doc__)
        parser.add_argument("name", metavar="NAME", help="of the place in the document")
        parser.add_argument("folders", metavar="FOLDER", nargs="+", help="of a report")
        parser.add_argument("document", metavar="FILE", type=Path, help="a Markdown document")
        parser.add_argument("--brief", action="store_true", help="one table each")
        parser.add_argument("--png", metavar="FILE", type=Path, help="curves of the first report, as a picture")
        parser.add_argument("--series", metavar="NAME,...", help="whose curves; all of them unless told")
        given = parser.parse_args(argv)
        parts = [read_results(folder) for folder in given.folders]
        content = "\n".join((brief if given.brief else markdown)(part) for part in parts)
        write_atomic(given.document, fill(given.document.read_text(encoding="utf-8"), given.name, content))
        print(given.document)
        if given.png:
            print(summary_png(parts[0], given.png, given.series.split(",") if given.series else None))
        return 0

    return guard(body)


def _series(results: Results) -> list[str]:
    return [series for series in results.series if ":" not in series]


def _states(results: Results) -> list[tuple[str, int]]:
    """(series, steps) of the table: N, and every later end of a training."""
    found = []
    for series in _series(results):
        ends = {step for target in results.targets for step in results.told_steps(series, target)}
        found += [(series, step) for step in sorted(ends)]
    return found


def _chosen(results: Results, series: str) -> str:
    values = chosen(results, series)
    mark = MARK if at_an_end(results, series) else ""
    return ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in values.items()) + mark if values else "–"


def _heads(names: list[str]) -> list[str]:
    return [_line(names), _line(["---", *["---:"] * (len(names) - 1)])]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
