"""The output of the demo: four sentences, a table, and the paths of its page and its image."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fine_dist.study.report.claims import HELD, MISSING, verdicts
from fine_dist.study.report.number_text import number, ratio
from fine_dist.study.report.posters import save_poster
from fine_dist.study.report.render import print_table, write_report
from fine_dist.study.report.results import Results
from fine_dist.study.report.tables import rows
from fine_dist.study.report.worth import end_curve, steps_to_reach


def show(results: Results, folder: Path, seconds: float) -> Path:
    """Write the report and the image of samples into a folder and print the results; returns the path of the page.

    Args:
        results: The results.
        folder: Folder of the report.
        seconds: Duration of the demo.
    """
    page = write_report(folder, results, echo=False)
    picture = save_poster("samples", results, folder / "samples.png")
    console = Console()
    for line in headline(results):
        console.print(line, highlight=False, markup=False)
    print_table(rows(results).without("FLOPs", "Fréchet distance", "seconds"), console)
    outcomes = [verdict.plain for verdict in verdicts(results) if verdict.plain != MISSING]
    console.print(f"picture: {picture}", soft_wrap=True)
    console.print(
        f"report:  {page} ({seconds:.0f} s; {outcomes.count(HELD)} of {len(outcomes)} published claims hold here)",
        soft_wrap=True,
        highlight=False,
    )
    return page


def headline(results: Results) -> list[str]:
    """The main results in four sentences, computed from the measurements of one depth."""
    main, baseline = results.main, results.baseline
    targets = [t for t in results.targets if results.ends(baseline, t)]
    target = targets[len(targets) // 2]
    start = results.mean(main, target, 0)
    if start is None:
        return []
    ours, theirs = results.name_of(main), results.name_of(baseline)
    steps = results.init_steps(main, target)
    trained = max(m.trained for m in results.at(main, target, 0))
    lines = [
        f"{target} layers: {ours} after {steps:,} steps of {trained:,} scalers: loss {number(start.mean)}"
        + _accuracy(results, main, target, 0)
        + "."
    ]
    untrained = results.mean(f"{main}:untrained", target, 0)
    if untrained is not None:
        shown = _accuracy(results, f"{main}:untrained", target, 0)
        lines.insert(0, f"{target} layers: {ours} without any training: loss {number(untrained.mean)}{shown}.")
    curve = end_curve(results, baseline, target)
    reached = steps_to_reach(curve, start.mean)
    last = curve.steps[-1]
    if reached is None:
        need = f"does not reach that loss in {last:,} steps ({number(curve.losses[-1])}"
    else:
        times = ratio(round(reached / steps, 1))
        need = f"needs {reached:,.0f} steps of the whole model for that loss, {times} times as many (after {last:,}: "
        need += number(curve.losses[-1])
    lines.append(f"{theirs[0].upper()}{theirs[1:]} {need}{_accuracy(results, baseline, target, last)}).")
    n = results.budget or 0
    losses = [(mean.mean, s) for s in results.series if ":" not in s and (mean := results.mean(s, target, n))]
    best, winner = min(losses)
    lines.append(f"Best after {n:,} training steps: {results.name_of(winner)} ({number(best)}).")
    return lines


def _accuracy(results: Results, series: str, target: int, step: int) -> str:
    mean = results.mean(series, target, step, "accuracy")
    return f", {mean.mean:.0%} of its digits are recognized" if mean else ""
