"""The report as one HTML file: no script, no font, no picture from elsewhere. Light, readable, printable."""

from __future__ import annotations

import base64
from html import escape

from fine_dist.report.canvas import picture_png
from fine_dist.report.css import CSS
from fine_dist.report.figures import bars_svg, colour, curves_svg, sigma_svg
from fine_dist.report.orderings import MEASURES, Comparison, Verdict, arithmetic, number, verdicts
from fine_dist.report.results import Picture, Results, label
from fine_dist.report.table import table


def page(results: Results) -> str:
    """The whole page. Sections without data are left out."""
    sections = [_head(results), _tiles(results), _promises(results)]
    curves = curves_svg(results)
    if curves:
        sections.append(_section("Held-out loss", _figure(curves, _curves_caption(results))))
    sections.append(_section("All targets", _table(results)))
    bars = bars_svg(results)
    if bars:
        sections.append(_section("Fréchet distance", _figure(bars, _bars_caption(results))))
    sections += [_gallery(results), _sigma(results), _setup(results)]
    body = "\n".join(part for part in sections if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(results.title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _section(title: str, content: str, intro: str = "") -> str:
    intro = f"<p>{intro}</p>" if intro else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{content}</section>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def _seeds(results: Results) -> str:
    num = len(results.seeds)
    return f"{num} seed{'s' if num != 1 else ''}"


# --- the top -------------------------------------------------------------------------------------------------------


def _head(results: Results) -> str:
    made = f"{len(results.rows):,} measurements, {_seeds(results)}"
    made += f", {escape(results.created)}" if results.created else ""
    return (
        f"<header><h1>{escape(results.title)}</h1><p class=lead>{_lead(results)}</p><p class=meta>{made}</p></header>"
    )


def _lead(results: Results) -> str:
    """The one comparison the method stands or falls by, in words made from the rows."""
    first = verdicts(results)[0]
    known = [c for c in first.of("held_out_loss") if c.held is not None]
    if not known:
        return "Nothing here compares FINE with scratch yet."
    won = [str(c.target) for c in known if c.held]
    lost = [str(c.target) for c in known if not c.held]
    parts = []
    if won:
        parts.append(f"a lower held-out loss than scratch at depth {_and(won)}")
    if lost:
        parts.append(f"a higher one at depth {_and(lost)}")
    verb = "have" if len(known) > 1 else "has"
    text = f"After equal training, targets initialised from the learngene {verb} {', and '.join(parts)}."
    third = verdicts(results)[1]
    known = [c for c in third.of("held_out_loss") if c.held is not None]
    if known:
        good = [str(c.target) for c in known if c.held]
        text += (
            f" Scratch with three times the steps does not catch up at depth {_and(good)}."
            if good
            else " Scratch with three times the steps does catch up."
        )
    return text


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _tiles(results: Results) -> str:
    tiles = []
    a = results.ancestor
    if a:
        cost = f"{a.steps:,} steps, {a.seconds:,.0f} s"
        cost += f", held-out loss {number(a.held_out_loss)}" if a.held_out_loss is not None else ""
        tiles.append((f"{a.layers} layers", f"ancestor {escape(a.name)}", cost))
        if a.learngene_params:
            full = sum(results.target_params.get(t, 0) for t in results.targets)
            versus = f"against {full:,} in all full targets" if full else ""
            tiles.append((_short(a.learngene_params), "numbers in the learngene", versus))
    for target in results.targets:
        ours = results.mean("fine", target, budget) if (budget := results.budget(target)) else None
        scratch = results.mean("he", target, budget) if budget else None
        if ours and scratch and budget:
            change = ours.mean / scratch.mean - 1
            tiles.append(
                (
                    f"{change * 100:+.1f} %".replace("-", "−"),
                    f"loss against scratch, {target} layers",
                    f"{number(ours.mean)} and {number(scratch.mean)} after {budget:,} steps",
                )
            )
    cells = "".join(f"<div><b>{a}</b><span>{b}</span><small>{c}</small></div>" for a, b, c in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _short(value: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


# --- what held -----------------------------------------------------------------------------------------------------


def _promises(results: Results) -> str:
    items = [_promise(v) for v in verdicts(results) if v.held is not None]
    missing = [v for v in verdicts(results) if v.held is None]
    content = f'<div class="promises">{"".join(items)}</div>' if items else ""
    if missing:
        names = "; ".join(f"{escape(v.claim)} <em>({v.source})</em>" for v in missing)
        content += f"<p class=missing><b>Not measured on this run:</b> {names}.</p>"
    costs = "".join(
        f"<p class=cost><b>{what.capitalize()}.</b> {escape(text)}</p>" for what, text in arithmetic(results)
    )
    intro = f"Each comparison is of means over {_seeds(results)}, at exactly the steps named."
    if len(results.seeds) > 1:
        intro += " A chip ending in ± is a difference smaller than the seeds’ own spread."
    if len(results.seeds) < 3:
        intro += " The paper’s orderings want three seeds or more: read these with care."
    return _section("What the method promises, and what held", content + costs, intro)


def _promise(verdict: Verdict) -> str:
    state = "yes" if verdict.held else "no"
    lines = []
    for measure, name in MEASURES.items():
        chips = "".join(_chip(c) for c in verdict.of(measure) if c.held is not None)
        if chips:
            lines.append(f"<div class=measure><span>{name}</span>{chips}</div>")
    if verdict.facts:
        chips = "".join(f'<span class="chip {state}"><i>{escape(a)}</i>{escape(b)}</span>' for a, b in verdict.facts)
        lines.append(f"<div class=measure><span>by kind</span>{chips}</div>")
    note = f"<p class=meta>{escape(verdict.note)}</p>" if verdict.note else ""
    return (
        f'<div class="promise {state}"><div class=claim><b>{escape(verdict.claim)}<small>{verdict.source}</small></b>'
        f"<span class=verdict>{verdict.word}</span></div>{''.join(lines)}{note}</div>"
    )


def _chip(c: Comparison) -> str:
    state = "yes" if c.held else "no"
    spread = " ±" if c.within_spread else ""
    title = escape(f"{c.left} against {c.right}")
    return f'<span class="chip {state}" title="{title}"><i>{c.target} layers</i>{escape(c.text())}{spread}</span>'


# --- curves, table, bars -------------------------------------------------------------------------------------------


def _curves_caption(results: Results) -> str:
    bands = ", bands one standard deviation" if len(results.seeds) > 1 else ""
    caption = (
        "Mean squared error of the predicted noise on data never trained on, at fixed timesteps and noise. Lines are "
        f"means over {_seeds(results)}{bands}. The dashed level is FINE’s loss after N steps. "
    )
    init = {results.init_steps(t) for t in results.targets}
    if len(init) == 1 and 0 not in init:
        caption += f"FINE’s first point comes after {init.pop():,} steps of training sigma alone, not on the axis."
    return caption


def _bars_caption(results: Results) -> str:
    caption = "Lower is better. Pale bars have had three times the training steps. "
    caption += "Whiskers are one standard deviation over seeds. " if len(results.seeds) > 1 else ""
    if results.frechet_samples:
        caption += f"{results.frechet_samples:,} samples each. "
    if results.classifier_accuracy is not None:
        caption += f"Features of a classifier that gets {results.classifier_accuracy:.1%} of held-out images right. "
    if results.frechet_floor is not None:
        caption += f"Held-out real data is at {number(results.frechet_floor)}."
    return caption


def _table(results: Results) -> str:
    made = table(results)
    heads = "".join(f"<th{' class=t' if i == 1 else ''}>{escape(h)}</th>" for i, h in enumerate(made.heads))
    body: list[str] = []
    before: tuple[int | None, str] = (None, "")
    for line in made.lines:
        same = (line.target, line.series) == before
        dot = f'<i class=dot style="background:{colour(line.series, results)}"></i>'
        cells = [
            "" if line.target == before[0] else line.cells[0],
            "" if same else dot + escape(line.cells[1]),
            *map(escape, line.cells[2:]),
        ]
        row = "".join(f"<td{' class=t' if i == 1 else ''}>{c}</td>" for i, c in enumerate(cells))
        kind = " class=first" if line.target != before[0] else "" if same else " class=next"
        body.append(f"<tr{kind}>{row}</tr>")
        before = (line.target, line.series)
    spread = "Mean ± standard deviation over seeds" if len(results.seeds) > 1 else "One seed"
    caption = (
        f"Steps are training steps after initialisation. {spread}; seconds are wall time of one target’s own stages "
        "until then, without the ancestor’s."
    )
    return _figure(
        f"<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>", caption
    )


# --- pictures ------------------------------------------------------------------------------------------------------


def _gallery(results: Results) -> str:
    if not results.pictures:
        return ""
    rows: dict[int | None, list[Picture]] = {}
    for picture in results.pictures:
        rows.setdefault(picture.target, []).append(picture)
    blocks = []
    for target in sorted(rows, key=lambda t: -1 if t is None else t):
        cards = "".join(_card(p) for p in rows[target])
        title = f"<h3>{target} layers</h3>" if target is not None else ""
        blocks.append(f'{title}<div class="cards">{cards}</div>')
    return _section(
        "Samples", "".join(blocks), "Samples beside each other start from the same noise, one image a label."
    )


def _card(picture: Picture) -> str:
    name = picture.caption or (label(picture.series) if picture.method else "real data")
    if picture.step is not None and not picture.caption:
        name += f", {picture.step:,} steps" if picture.step else ", right after initialisation"
    data = base64.b64encode(picture_png(picture)).decode()
    return (
        f'<figure class="card"><img alt="{escape(name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )


def _sigma(results: Results) -> str:
    svg = sigma_svg(results)
    if not svg:
        return ""
    caption = (
        "Above: each component’s sigma by layer, as its difference from the mean over layers (red above, blue below), "
        "sorted by slope. Below: the first principal component of the learngene’s sigma against relative depth, with a "
        "straight line for comparison; targets are their own trained sigma seen in the same direction. r: correlation "
        "with depth."
    )
    return _section("Sigma over depth", _figure(svg, caption))


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
    note = (
        "<p class=meta>Every number on this page is computed from the rows in <code>results.json</code> beside it.</p>"
    )
    return _section("How it was made", f'<div class="two">{"".join(blocks)}</div>{note}')


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
