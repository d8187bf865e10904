"""The report on disk, and its tables and verdicts as a page (jinja2), in a terminal (rich) and as Markdown.

The renderer of the page escapes every text.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fine_dist.core.files import write_atomic
from fine_dist.study.report import text
from fine_dist.study.report.canvas import color_of, picture_png
from fine_dist.study.report.claims import FAILED, HELD, MEASURES, MISSING, NOISE, Verdict, verdicts
from fine_dist.study.report.figures import FIGURES
from fine_dist.study.report.measurements import Picture
from fine_dist.study.report.number_text import plain
from fine_dist.study.report.results import Results
from fine_dist.study.report.tables import TABLES, ReportTable, costs, quality, ranking, rows, storage
from fine_dist.study.report.text import about
from fine_dist.study.report.worth import recommendation

_CLASSES = {HELD: "yes", FAILED: "no", NOISE: "noise", MISSING: "missing"}
_MARKS = {HELD: "[green]✓[/]", FAILED: "[red]✗[/]", NOISE: "[yellow]~[/]", MISSING: "[dim]–[/]"}
_SECTION_TABLES = {"rows": "rows", "saved": "saved", "break_even": "break_even", "storage": "storage", "costs": "costs",
                   "tuning": "tuning"}  # fmt: skip


def write_report(
    folder: str | Path,
    results: Results,
    *,
    shown: PageReport | None = None,
    echo: bool = True,
    console: Console | None = None,
    claims: bool = True,
) -> Path:
    """Write `results.json`, `report.html` and `pictures/*.png` into a folder.

    Args:
        folder: Folder of the report.
        results: The results.
        shown: The results as the page shows them, if `page_report` has drawn them already.
        echo: Whether to print the table as well.
        console: Console to print to. None: stdout.
        claims: Whether the verdicts are printed.

    Returns:
        The path of the page.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    for i, picture in enumerate(results.pictures):
        parts = [picture.series if picture.method else "real" if picture.target is None else "parent"]
        parts += [f"L{picture.target}"] if picture.target is not None else []
        parts += [f"step{picture.step}"] if picture.step is not None else []
        picture.file = f"pictures/{i:02d}-{'-'.join(parts).replace(':', '-')}.png"
        write_atomic(folder / picture.file, picture_png(picture, width=1))
    data = results.model_dump(mode="json")
    data["verdicts"] = [verdict.as_json() for verdict in verdicts(results)]
    write_atomic(folder / "results.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / "report.html", page(shown or page_report(results)))
    if echo:
        print_report(results, console, claims)
    return folder / "report.html"


# --- the page --------------------------------------------------------------------------------------------------------


class Card(NamedTuple):
    """A sample grid on the page: its PNG as a data URL, its text, and the series it belongs to (-1: none)."""

    url: str
    caption: str
    series: int


class PageSection(NamedTuple):
    """A section of the page; `kind` names the block of the template that shows it."""

    kind: str
    title: str
    figure: str
    caption: str
    table: ReportTable | None
    verdicts: list[Verdict]
    cards: list[tuple[str, list[Card]]]


class PageReport(NamedTuple):
    """One report of a page, with its figures drawn; the template reads the fields."""

    results: Results
    lead: str
    tiles: list[tuple[str, str, str]]
    keys: list[tuple[int, str, str]]
    sections: list[PageSection]
    recommendation: list[str]


def page_report(results: Results) -> PageReport:
    """Draw the figures of a report and set its tables. Drawing takes seconds, so that pages share the outcome."""
    return PageReport(
        results=results,
        lead=text.lead(results),
        tiles=text.tiles(results),
        keys=[(i, results.name_of(s), color_of(s, results)) for i, s in enumerate(results.series)],
        sections=[s for key, title in results.sections.items() if (s := _section(results, key, title))],
        recommendation=recommendation(results),
    )


def page(*reports: PageReport) -> str:
    """One self-contained HTML file of one report or of several."""
    environment = Environment(
        loader=PackageLoader("fine_dist.study.report", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    source = environment.loader
    assert source is not None
    script, sheet = (source.get_source(environment, f"report.{kind}")[0] for kind in ("js", "css"))
    return environment.get_template("report.html").render(
        title=reports[0].results.title, reports=reports, script=Markup(script), sheet=Markup(sheet), text=text,
        plain=plain, classes=_CLASSES, measures=MEASURES, color_of=color_of,
    )  # fmt: skip


def _section(results: Results, key: str, title: str) -> PageSection | None:
    figure = FIGURES[key](results) if key in FIGURES else None
    table = TABLES[_SECTION_TABLES[key]](results) if key in _SECTION_TABLES else None
    table = table if table and table.rows else None
    claims = verdicts(results) if key == "claims" else []
    cards = _gallery(results) if key == "pictures" else []
    if not (figure or table or claims or cards or (key == "setup" and (results.config or results.machine))):
        return None
    caption = text.CAPTIONS[key](results) if key in text.CAPTIONS and (figure or cards) else ""
    return PageSection(key, title, Markup(figure or ""), caption, table, claims, cards)


def _gallery(results: Results) -> list[tuple[str, list[Card]]]:
    """Sample grids by title: real data and ancestors first, then targets by depth, series and training length."""
    groups: dict[str, list[Card]] = {}
    order = {series: i for i, series in enumerate(results.series)}
    shown = [p for p in results.pictures if p.method is None or p.series in order]
    for p in sorted(shown, key=lambda p: (p.target or 0 if p.method else 0, order.get(p.series, -1), p.step or 0)):
        title = f"{p.target} layers" if p.method and p.target is not None else ""
        url = f"data:image/png;base64,{base64.b64encode(picture_png(p)).decode()}"
        groups.setdefault(title, []).append(Card(url, card_text(results, p), order.get(p.series, -1)))
    return list(groups.items())


def card_text(results: Results, picture: Picture) -> str:
    """The caption of a sample grid."""
    if picture.caption or picture.method is None:
        return picture.caption or "real data"
    name = results.name_of(picture.series)
    if picture.step is None:
        return name
    init = results.init_steps(picture.series, picture.target or 0)
    steps = [f"{init:,} initialization steps"] if init else []
    if picture.step:
        steps.append(f"{picture.step:,} training steps")
    elif not init and not name.endswith("untrained"):  # a series of untrained models is called so already
        steps.append("untrained")
    return ", ".join([name, " + ".join(steps)] if steps else [name])


# --- the terminal ----------------------------------------------------------------------------------------------------


def print_report(results: Results, console: Console | None = None, claims: bool = True) -> None:
    """Print the table of all targets, the recommendation, and one line for each claim.

    Args:
        results: The results.
        console: Console to print to. None: stdout.
        claims: Whether the verdicts are printed as well.
    """
    console = console or Console()
    table = rows(results)
    if console.width < 110:  # a narrow terminal shows fewer columns instead of truncated numbers
        table = table.without("FLOPs", "stored", "accuracy")
    print_table(table, console, results.title)
    for line in recommendation(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if claims:
        for verdict in verdicts(results):
            if verdict.plain != MISSING:
                console.print(
                    f"{_MARKS[verdict.plain]} {escape(verdict.claim)}: [bold]{verdict.outcome}[/]", highlight=False
                )


def print_table(table: ReportTable, console: Console, title: str = "") -> None:
    """Print a table; cells that repeat the row above in the first two columns are left blank."""
    shown = Table(title=escape(title) or None, title_justify="left", title_style="bold", header_style="dim",
                  box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    for i, head in enumerate(table.heads):
        justify: Literal["left", "right"] = "left" if i == table.text_columns - 1 else "right"
        # heads may break at spaces; cells never break
        shown.add_column(head.replace(" ", "\n"), justify=justify, no_wrap=True)
    before: list[str] = []
    for row, after in zip(table.rows, [*table.rows[1:], None]):
        cells = [escape(cell.text) for cell in row.cells]
        repeated = [before[: i + 1] == cells[: i + 1] for i in range(table.text_columns)]
        visible = ["" if repeats else cell for repeats, cell in zip(repeated, cells)] + cells[table.text_columns :]
        ends = after is not None and after.group != row.group
        shown.add_row(*visible, style="bold" if row.strong else None, end_section=ends)
        before = cells
    console.print(shown)


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """The whole report under a heading: quality, saved steps, break-even, costs, storage, verdicts."""
    parts = [f"## {results.title}", "", about(results), ""]
    for title, table in (
        ("", quality(results)),
        ("Steps from scratch that each start saves:", TABLES["saved"](results)),
        ("Total FLOPs for n models:", TABLES["break_even"](results)),
        ("Costs at the last step:", costs(results)),
        ("", storage(results)),
    ):
        if table.rows:
            heading = title or ("" if table.caption == about(results) else table.caption)
            parts += [heading, ""] if heading else []
            parts += [markdown_table(table), ""]
    parts += [*recommendation(results), ""] if recommendation(results) else []
    return "\n".join([*parts, markdown_verdicts(results)])


def brief(results: Results) -> str:
    """One table in Markdown: every series after N steps, best first."""
    table = ranking(results)
    return "\n".join([f"**{results.title}**", "", table.caption, "", markdown_table(table), ""])


def markdown_table(table: ReportTable) -> str:
    """A table in Markdown; strong rows have a bold name."""
    left = table.text_columns
    lines = [_line(table.heads), _line(["---" if i < left else "---:" for i in range(len(table.heads))])]
    for row in table.rows:
        cells = [cell.text.replace("|", "\\|") for cell in row.cells]
        cells[left - 1] = f"**{cells[left - 1]}**" if row.strong else cells[left - 1]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_verdicts(results: Results) -> str:
    """Each claim and its verdict in Markdown, with the comparisons behind it."""
    lines = ["Verdicts:", ""]
    for verdict in verdicts(results):
        lines.append(f"- {verdict.claim}: **{verdict.outcome}** ({verdict.source})")
        if verdict.plain == MISSING:
            continue
        for measure, name in MEASURES.items():
            measured = [c for c in verdict.of(measure) if c.held is not None]
            texts = [f"{c.target} layers {c.text()} ({c.outcome})" for c in measured]
            lines += [f"  - {name}: {'; '.join(texts)}"] if texts else []
        lines += [f"  - {what}: {value}" for what, value in verdict.facts]
        lines += [f"  - {verdict.note}"] if verdict.note else []
    return "\n".join([*lines, ""])
