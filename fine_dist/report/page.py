"""The report as one HTML file: no script, no font, no picture from elsewhere. Light, readable, printable."""

from __future__ import annotations

import base64
from html import escape

from fine_dist.report.figures import bars_svg, colour, curves_svg, picture_png, sigma_svg
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
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head>\n'
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
    intro = (
        f"Each comparison is of means over {_seeds(results)}, at exactly the steps named; “±” marks a difference "
        "smaller than the seeds’ own spread."
    )
    return _section("What the method promises, and what held", content + costs, intro)


def _promise(verdict: Verdict) -> str:
    state = "yes" if verdict.held else "no"
    lines = []
    for measure, name in MEASURES.items():
        chips = "".join(_chip(c) for c in verdict.of(measure) if c.held is not None)
        if chips:
            lines.append(f"<div class=measure><span>{name}</span>{chips}</div>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in verdict.notes)
    notes = f"<ul>{notes}</ul>" if notes else ""
    return (
        f'<div class="promise {state}"><div class=claim><b>{escape(verdict.claim)}<small>{verdict.source}</small></b>'
        f"<span class=verdict>{verdict.word}</span></div>{''.join(lines)}{notes}</div>"
    )


def _chip(c: Comparison) -> str:
    state = "yes" if c.held else "no"
    spread = " ±" if c.within_spread else ""
    title = escape(f"{c.left} against {c.right}")
    return f'<span class="chip {state}" title="{title}"><i>{c.target} layers</i>{escape(c.text())}{spread}</span>'


# --- curves, table, bars -------------------------------------------------------------------------------------------


def _curves_caption(results: Results) -> str:
    caption = (
        "Mean squared error of the predicted noise on data never trained on, at fixed timesteps and noise. Lines are "
        f"means over {_seeds(results)}, bands one standard deviation. The dashed level is FINE’s loss after N steps. "
    )
    init = {results.init_steps(t) for t in results.targets}
    if len(init) == 1 and 0 not in init:
        caption += (
            f"FINE’s first point comes after {init.pop():,} steps of training sigma alone, which are not on the axis; "
        )
        caption += "the comparison at equal total steps is above."
    return caption


def _bars_caption(results: Results) -> str:
    caption = (
        "Lower is better. Pale bars have had three times the training steps; whiskers are one standard deviation. "
    )
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
    body, before = [], (None, "")
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
    caption = (
        "Steps are training steps after initialisation. Mean ± standard deviation over seeds; seconds are wall time of "
        "one target’s own stages until then, without the ancestor’s."
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
    if picture.step is not None:
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


_CSS = """
:root{--sans:"Inter","Segoe UI","Helvetica Neue",Arial,"Liberation Sans",sans-serif;--ink:#1f2933;--soft:#52606d;
--faint:#7b8794;--line:#e4e7eb;--yes:#0b7285;--yes-bg:#e6f5f7;--no:#c92a2a;--no-bg:#fdeeee}
*{box-sizing:border-box}
body{margin:0;background:#fbfbfa;color:var(--ink);font:16px/1.55 var(--sans);-webkit-font-smoothing:antialiased}
main{max-width:1080px;margin:0 auto;padding:56px 28px 80px}
h1{font-size:34px;line-height:1.2;letter-spacing:-.02em;margin:0 0 14px}
h2{font-size:21px;letter-spacing:-.01em;margin:0 0 10px}h3{font-size:15px;margin:22px 0 8px}
p{margin:0 0 14px;max-width:76ch}.lead{font-size:19px;color:var(--soft);max-width:68ch}
.meta,small,figcaption{color:var(--faint);font-size:13.5px;line-height:1.5}
section{margin-top:54px}figure{margin:0}figcaption{margin-top:10px;max-width:92ch}
svg,img{display:block;width:100%;height:auto}section>figure>svg{background:#fff;border:1px solid var(--line);
border-radius:10px;padding:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin-top:30px}
.tiles div{background:#fff;border:1px solid var(--line);border-radius:10px;padding:16px 18px;display:flex;
flex-direction:column}.tiles b{font-size:26px;letter-spacing:-.02em;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{font-size:14px;color:var(--soft);margin-top:2px}.tiles small{margin-top:6px;font-size:12.5px}
.promises{display:grid;gap:10px}
.promise{background:#fff;border:1px solid var(--line);border-left:4px solid var(--yes);
border-radius:8px;padding:13px 18px}
.promise.no{border-left-color:var(--no)}.claim{display:flex;justify-content:space-between;gap:20px;align-items:baseline}
.verdict{white-space:nowrap;font-size:14px;font-weight:600;color:var(--yes)}.no .verdict{color:var(--no)}
.measure{display:flex;flex-wrap:wrap;gap:7px;align-items:center;margin-top:8px;font-size:13.5px}
.measure>span:first-child{width:128px;color:var(--faint)}
.chip{background:var(--yes-bg);color:#084c58;border-radius:6px;padding:2px 10px;font-variant-numeric:tabular-nums}
.chip.no{background:var(--no-bg);color:#8a1c1c}.chip i{font-style:normal;opacity:.65;margin-right:8px}
.promise ul{margin:8px 0 4px;padding-left:18px;font-size:13.5px;color:var(--soft)}
.claim small{font-weight:400;margin-left:12px}
.missing{margin-top:16px;font-size:14.5px;color:var(--soft);max-width:none}
.missing em{color:var(--faint);font-style:normal}
.cost{font-size:14.5px;color:var(--soft);max-width:none;margin-bottom:6px}
.scroll{overflow-x:auto;background:#fff;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--faint);font-size:12.5px;line-height:1.3;vertical-align:bottom}
th,td{padding:6px 18px;text-align:right;white-space:nowrap}th{white-space:normal}.t{text-align:left}
tbody tr.first td{border-top:1px solid var(--line)}tbody tr.first td:first-child{font-weight:700}
tbody tr.next td:nth-child(n+2){border-top:1px dotted var(--line)}
.dot{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:8px}
.plain td{padding:4px 14px 4px 0;white-space:normal;vertical-align:top}.plain td:first-child{color:var(--faint)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:36px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:16px}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:12px}
.card img{image-rendering:pixelated;border-radius:4px}.card figcaption{margin-top:8px}
@media (max-width:720px){.two{grid-template-columns:1fr}.claim{flex-direction:column;gap:2px}h1{font-size:27px}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
