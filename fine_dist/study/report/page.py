"""The report as one HTML file: no script, no font, no picture from elsewhere. Light, readable, printable."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape

from fine_dist.study.report import words
from fine_dist.study.report.canvas import picture_png
from fine_dist.study.report.claims import FAILED, MEASURES, MISSING, NOISE, Comparison, Verdict, verdicts
from fine_dist.study.report.cost_table import arithmetic
from fine_dist.study.report.css import CSS
from fine_dist.study.report.figures import bars_svg, colour, curves_svg, tables_svg
from fine_dist.study.report.results import Picture, Results, number
from fine_dist.study.report.storage import COUNTS, storage
from fine_dist.study.report.table import table
from fine_dist.study.report.tradeoffs import costs_svg, depths_svg, storage_svg
from fine_dist.study.report.tuning import MARK, at_an_end, ends

_STATES = {FAILED: "no", NOISE: "noise"}
"""Classes of the style sheet for verdicts; the others are `yes`."""


def page(*parts: Results) -> str:
    """The whole page, of one report or of several below each other. Sections without data are left out."""
    body = "\n".join(_body(results) for results in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(parts[0].title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _body(results: Results) -> str:
    parts = [_head(results), words.tiles(results)]
    for key, title in results.sections.items():
        content = _SECTIONS[key](results)
        if content:
            parts.append(f"<section><h2>{escape(title)}</h2>{content}</section>")
    return "\n".join(part for part in parts if part)


def _figure(content: str | None, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>" if content else ""


def _head(results: Results) -> str:
    made = f"{len(results.rows):,} measurements, {words.seeds(results)}"
    made += f", {escape(results.created)}" if results.created else ""
    return (
        f"<header><h1>{escape(results.title)}</h1><p class=lead>{words.lead(results)}</p>"
        f"<p class=meta>{made}</p></header>"
    )


# --- what held -----------------------------------------------------------------------------------------------------


def _claims(results: Results) -> str:
    found = verdicts(results)
    items = [_promise(v) for v in found if v.plain != MISSING]
    missing = [v for v in found if v.plain == MISSING]
    content = f'<div class="promises">{"".join(items)}</div>' if items else ""
    if missing:
        names = "; ".join(f"{escape(v.claim)} <em>({escape(v.source)})</em>" for v in missing)
        content += f"<p class=missing><b>Not measured on this run:</b> {names}.</p>"
    content += "".join(
        f"<p class=cost><b>{what.capitalize()}.</b> {escape(text)}</p>" for what, text in arithmetic(results)
    )
    intro = f"Each comparison is of means over {words.seeds(results)}, at exactly the steps named."
    if len(results.seeds) > 1:
        intro += " A chip ending in ± is a difference smaller than the seeds’ own spread."
    if len(results.seeds) < 3:
        intro += " An ordering wants three seeds or more: read these with care."
    return f"<p>{intro}</p>{content}" if content else ""


def _promise(verdict: Verdict) -> str:
    state = _STATES.get(verdict.plain, "yes")
    lines = []
    for measure, name in MEASURES.items():
        chips = "".join(_chip(c) for c in verdict.of(measure) if c.held is not None)
        if chips:
            lines.append(f"<div class=measure><span>{name}</span>{chips}</div>")
    if verdict.facts:
        chips = "".join(f'<span class="chip {state}"><i>{escape(a)}</i>{escape(b)}</span>' for a, b in verdict.facts)
        lines.append(f"<div class=measure><span>by matrix</span>{chips}</div>")
    note = f"<p class=meta>{escape(verdict.note)}</p>" if verdict.note else ""
    return (
        f'<div class="promise {state}"><div class=claim><b>{escape(verdict.claim)}<small>{escape(verdict.source)}'
        f"</small></b><span class=verdict>{verdict.word}</span></div>{''.join(lines)}{note}</div>"
    )


def _chip(c: Comparison) -> str:
    spread = " ±" if c.within_spread else ""
    title = escape(f"{c.left} against {c.right}: {c.word}")
    return (
        f'<span class="chip {_STATES.get(c.word, "yes")}" title="{title}"><i>{c.target} layers</i>'
        f"{escape(c.text())}{spread}</span>"
    )


# --- rows ----------------------------------------------------------------------------------------------------------


def _rows(results: Results) -> str:
    made = table(results)
    if not made.lines:
        return ""
    heads = "".join(f"<th{' class=t' if i == 1 else ''}>{escape(h)}</th>" for i, h in enumerate(made.heads))
    body: list[str] = []
    before: tuple[int | None, str] = (None, "")
    for line in made.lines:
        same = (line.target, line.series) == before
        dot = f'<i class=dot style="background:{escape(colour(line.series, results))}"></i>'
        cells = [
            "" if line.target == before[0] else line.cells[0],
            "" if same else dot + escape(line.cells[1]),
            *map(escape, line.cells[2:]),
        ]
        row = "".join(f"<td{' class=t' if i == 1 else ''}>{c}</td>" for i, c in enumerate(cells))
        mark = " class=first" if line.target != before[0] else "" if same else " class=next"
        body.append(f"<tr{mark}>{row}</tr>")
        before = (line.target, line.series)
    content = f"<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    return _figure(content, words.rows_caption(results))


def _stored(results: Results) -> str:
    """Numbers for so many models, series by series."""
    found = storage(results)
    if len(found) < 2:
        return ""
    heads = "".join(f"<th>{n} models</th>" for n in COUNTS)
    rows = "".join(
        f"<tr><td class=t>{escape(kept.label)}</td><td>{kept.shared:,}</td><td>{kept.own:,}</td>"
        + "".join(f"<td>{kept.of(n):,}</td>" for n in COUNTS)
        + "</tr>"
        for kept in found
    )
    head = f"<thead><tr><th class=t>series</th><th>shared</th><th>own</th>{heads}</tr></thead>"
    return f"<div class=scroll><table>{head}<tbody>{rows}</tbody></table></div>"


# --- pictures ------------------------------------------------------------------------------------------------------


def _gallery(results: Results) -> str:
    if not results.pictures:
        return ""
    rows: dict[int | None, list[Picture]] = {}
    for picture in results.pictures:
        rows.setdefault(picture.target, []).append(picture)
    blocks = []
    for target in sorted(rows, key=lambda t: -1 if t is None else t):
        cards = "".join(_card(p, results) for p in rows[target])
        title = f"<h3>{target} layers</h3>" if target is not None else ""
        blocks.append(f'{title}<div class="cards">{cards}</div>')
    return f"<p>Samples beside each other start from the same noise, one image a label.</p>{''.join(blocks)}"


def _card(picture: Picture, results: Results) -> str:
    name = picture.caption or (results.label(picture.series) if picture.method else "real data")
    if picture.step is not None and not picture.caption:
        name += f", {picture.step:,} steps" if picture.step else ", right after initialisation"
    data = base64.b64encode(picture_png(picture)).decode()
    return (
        f'<figure class="card"><img alt="{escape(name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )


# --- the end -------------------------------------------------------------------------------------------------------


def _setup(results: Results) -> str:
    blocks = []
    for title, values in (("Settings", results.config), ("Machine", results.machine)):
        if values:
            rows = "".join(
                f"<tr><td class=t>{escape(str(k))}</td><td class=t>{escape(_plain(v))}</td></tr>"
                for k, v in values.items()
            )
            blocks.append(f"<div><h3>{title}</h3><table class=plain><tbody>{rows}</tbody></table></div>")
    made = f" Made by <code>{escape(results.command)}</code>." if results.command else ""
    return (
        f'<div class="two">{"".join(blocks)}</div><p class=meta>Every number on this page is computed from the rows in '
        f"<code>results.json</code> beside it.{made}</p>"
    )


def _tuning(results: Results) -> str:
    """What every series tried, the losses, and which was chosen."""
    if not results.tuning:
        return ""
    points = [_plain(row["values"]) for row in next(iter(results.tuning.values()))]
    heads = "".join(f"<th>{escape(point)}</th>" for point in points)
    body = []
    for series, rows in results.tuning.items():
        mark = MARK if at_an_end(results, series) else ""
        cells = "".join(_tried(row["held_out_loss"], row["chosen"], mark) for row in rows)
        body.append(f"<tr><td class=t>{escape(results.label(series))}</td>{cells}</tr>")
    head = f"<thead><tr><th class=t></th>{heads}</tr></thead>"
    content = f"<div class=scroll><table>{head}<tbody>{''.join(body)}</tbody></table></div>"
    return _figure(
        content,
        "Held-out loss of what was tried, the same for every series, on a seed that is not reported. The lowest (bold) "
        f"was then used for every reported seed and depth. {ends(results)}",
    )


def _tried(loss: float | None, chosen: bool, mark: str) -> str:
    text = "–" if loss is None else number(loss)
    return f"<td><b>{text}</b>{mark}</td>" if chosen else f"<td>{text}</td>"


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


_SECTIONS: dict[str, Callable[[Results], str]] = {
    "claims": _claims,
    "curves": lambda results: _figure(curves_svg(results), words.curves_caption(results)),
    "rows": _rows,
    "bars": lambda results: _figure(bars_svg(results), words.bars_caption(results)),
    "depths": lambda results: _figure(depths_svg(results), words.depths_caption(results)),
    "costs": lambda results: _figure(costs_svg(results), words.costs_caption(results)),
    "storage": lambda results: _figure(storage_svg(results), words.storage_caption(results)) + _stored(results),
    "pictures": _gallery,
    "tables": lambda results: _figure(tables_svg(results), words.tables_caption(results)),
    "tuning": _tuning,
    "setup": _setup,
}
