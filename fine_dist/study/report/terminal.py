"""The same table and verdicts, printed to the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fine_dist.study.report.claims import FAILED, HELD, MEASURES, MISSING, NOISE, Verdict, verdicts
from fine_dist.study.report.cost_table import arithmetic
from fine_dist.study.report.results import Results
from fine_dist.study.report.table import table

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {HELD: "[green]✓[/]", FAILED: "[red]✗[/]", NOISE: "[yellow]~[/]", MISSING: "[dim]–[/]"}


def print_report(results: Results, console: Console | None = None) -> None:
    """The table, then every claim with its verdict and the numbers behind it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    made = table(results)
    if console.width < 110:  # costs are on the page; here numbers are shown whole, or not at all
        made = made.without("FLOPs", "stored")
    shown = Table(
        title=results.title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, head in enumerate(made.heads):
        shown.add_column(head, justify="left" if i == 1 else "right", no_wrap=True)
    for before, line, after in zip([None, *made.lines], made.lines, [*made.lines[1:], None]):
        seen = [before is not None and before[:i] == line[:i] for i in (1, 2)]  # said once, then left blank
        shown.add_row(
            *("" if again else cell for again, cell in zip(seen, line.cells)),
            *line.cells[2:],
            style="bold" if line.series == results.main else None,
            end_section=after is not None and after.target != line.target,
        )
    console.print(shown)
    if results.classifier_accuracy is not None:
        console.print(f"Fréchet distances use a classifier, {results.classifier_accuracy:.1%} right on held-out data")
    console.print("\n[bold]What the method promises, and what these rows show[/] (means over seeds)")
    for verdict in verdicts(results):
        _print_verdict(console, verdict)
    for what, sentence in arithmetic(results):
        console.print(f"  [dim]{what}:[/] {sentence}", highlight=False)


def _print_verdict(console: Console, verdict: Verdict) -> None:
    console.print(
        f"{_MARKS[verdict.plain]} {verdict.claim}: [bold]{verdict.word}[/] [dim]({verdict.source})[/]", highlight=False
    )
    if verdict.plain == MISSING:
        return
    for measure, name in MEASURES.items():
        for c in verdict.of(measure):
            if c.held is not None:
                spread = " (less than the seeds' spread)" if c.within_spread else ""
                console.print(f"    {_MARKS[c.word]} {c.target} layers, {name}: {c.text()}{spread}", highlight=False)
    if verdict.facts:
        console.print("    " + "; ".join(f"{what}: {value}" for what, value in verdict.facts), highlight=False)
    if verdict.note:
        console.print(f"    [dim]{verdict.note}[/]", highlight=False)
