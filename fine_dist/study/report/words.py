"""The sentences of the page: the lead, the tiles and the captions, made from rows and labels."""

from __future__ import annotations

from html import escape

from fine_dist.study.report.claims import Comparison, compare
from fine_dist.study.report.cost_table import ratio, short
from fine_dist.study.report.results import Claim, Results, number


def seeds(results: Results) -> str:
    num = len(results.seeds)
    return f"{num} seed{'s' if num != 1 else ''}"


def lead(results: Results) -> str:
    """The one comparison a method stands or falls by: the main series against the baseline at equal steps."""
    ours, theirs = escape(results.label(results.main)), escape(results.label(results.baseline))
    known = _against(results, "N") if results.main and results.baseline and results.budget else []
    if not known:
        return "Nothing here compares a main series with a baseline yet."
    won = [str(c.target) for c in known if c.held]
    lost = [str(c.target) for c in known if not c.held]
    parts = [f"a lower held-out loss than {theirs} at depth {_and(won)}"] if won else []
    parts += [f"no lower one at depth {_and(lost)}"] if lost else []
    text = f"After equal training, targets initialised by {ours} have {', and '.join(parts)}."
    longest = min((results.trained_steps(results.baseline, t) for t in results.targets), default=0)
    known = _against(results, longest, or_equal=True) if results.budget and longest > results.budget else []
    if results.budget and known:
        good = [str(c.target) for c in known if c.held]
        what = f"{theirs} with {ratio(longest / results.budget)} times the steps"
        what = what[0].upper() + what[1:]
        text += f" {what} is not better at depth {_and(good)}." if good else f" {what} is better."
    return text


def _against(results: Results, at: int | str, or_equal: bool = False) -> list[Comparison]:
    claim = Claim(text="", source="", chain=((results.main, "N"), (results.baseline, at)), or_equal=or_equal)
    return [c for c in compare(results, claim, "held_out_loss") if c.held is not None]


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def tiles(results: Results) -> str:
    """The first numbers a reader sees: what was condensed, how much it stores, and the gain a depth."""
    found = []
    a = results.ancestors.get(results.main)
    if a:
        cost = f"{a.steps:,} steps, {a.seconds:,.0f} s"
        cost += f", held-out loss {number(a.held_out_loss)}" if a.held_out_loss is not None else ""
        found.append((f"{a.layers} layers", f"ancestor {escape(a.name)}", cost))
        if a.stored:
            full = sum(results.target_params.get(t, 0) for t in results.targets)
            versus = f"against {full:,} in all full targets" if full else ""
            found.append((short(a.stored), "numbers that targets start from", versus))
    for c in _against(results, "N") if results.budget and results.main and results.baseline else []:
        if c.left_value and c.right_value:
            change = c.left_value.mean / c.right_value.mean - 1
            what = f"loss against {escape(results.label(results.baseline))}, {c.target} layers"
            values = f"{number(c.left_value.mean)} and {number(c.right_value.mean)} after {results.budget:,} steps"
            found.append((f"{change * 100:+.1f} %".replace("-", "−"), what, values))
    cells = "".join(f"<div><b>{a}</b><span>{b}</span><small>{c}</small></div>" for a, b, c in found)
    return f'<div class="tiles">{cells}</div>' if found else ""


def curves_caption(results: Results) -> str:
    bands = ", bands one standard deviation" if len(results.seeds) > 1 else ""
    caption = (
        "Mean squared error of the predicted noise on data never trained on, at fixed timesteps and noise. Lines are "
        f"means over {seeds(results)}{bands}. "
    )
    if results.main and results.budget:
        ours = escape(results.label(results.main))
        caption += f"The dashed level is the loss of {ours} after N = {results.budget:,} steps. "
        init = {results.init_steps(results.main, t) for t in results.targets}
        if len(init) == 1 and 0 not in init:
            caption += f"The first point of {ours} comes after {init.pop():,} steps of initialisation, not on the axis."
    return caption


def bars_caption(results: Results) -> str:
    caption = "Lower is better. Pale bars have had more than N training steps. "
    caption += "Whiskers are one standard deviation over seeds. " if len(results.seeds) > 1 else ""
    if results.frechet_samples:
        caption += f"{results.frechet_samples:,} samples each. "
    if results.classifier_accuracy is not None:
        caption += f"Features of a classifier that gets {results.classifier_accuracy:.1%} of held-out images right. "
    if results.frechet_floor is not None:
        caption += f"Held-out real data is at {number(results.frechet_floor)}."
    return caption


def depths_caption(results: Results) -> str:
    spread = " Whiskers are one standard deviation over seeds." if len(results.seeds) > 1 else ""
    return f"Every series after as many training steps as any other, initialisation and stage 1 not counted.{spread}"


def costs_caption(results: Results) -> str:
    return (
        "Each line is one series over its training; its cost is everything that was spent until then, a whole stage 1 "
        "and every step of initialisation included, counted as forward and backward FLOPs. Stage 1 is paid once, "
        "however many targets follow; here each target bears all of it. Lower and further left is better."
    )


def storage_caption(results: Results) -> str:
    return (
        "Numbers to keep for n initialised targets of the largest depth: what they share once, and each target's own. "
        "A series that stores every target whole is a line through the origin."
    )


def rows_caption(results: Results) -> str:
    spread = (
        "Mean ± standard deviation over seeds"
        if len(results.seeds) > 1
        else "One seed, where an ordering wants three seeds or more"
    )
    return (
        f"Steps are training steps after initialisation. {spread}; FLOPs and seconds are of one target’s own stages "
        "until then, without what all targets share; stored is the target’s own file, in numbers."
    )


def tables_caption(results: Results) -> str:
    first = escape(next(iter(results.tables), ""))
    return (
        f"{escape(results.tables_note)} Above: each component by layer, as its difference from the mean over layers "
        f"(red above, blue below), sorted by slope. Below: the first principal component of the {first} against "
        "relative depth, with a straight line for comparison; the others are seen in the same direction. "
        "r: correlation with depth."
    ).strip()
