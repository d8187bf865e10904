"""The sentences of a report as plain text: its lead, its key figures, and the captions."""

from __future__ import annotations

from collections.abc import Callable

from fine_dist.study.report.claims import Comparison, compare
from fine_dist.study.report.measurements import PublishedClaim
from fine_dist.study.report.number_text import number, ratio, short
from fine_dist.study.report.results import Results


def seeds(results: Results) -> str:
    """`3 seeds`."""
    num = len(results.seeds)
    return f"{num} seed{'s' if num != 1 else ''}"


def lead(results: Results) -> str:
    """The main comparison: main series against baseline at equal steps, then at the baseline's longest run."""
    ours, theirs = results.name_of(results.main), results.name_of(results.baseline)
    known = _against(results, "N") if results.main and results.baseline and results.budget else []
    if not known or results.budget is None:
        return "These results compare no main series with a baseline yet."
    won = [c.target for c in known if c.held]
    lost = [c.target for c in known if not c.held]
    parts = [f"a lower held-out loss than {theirs} at {_layers(won)}"] if won else []
    parts += [f"no lower loss at {_layers(lost)}"] if lost else []
    sentence = f"After {results.budget:,} training steps, targets initialized by {ours} have {' and '.join(parts)}."
    longest = min((results.trained_steps(results.baseline, t) for t in results.targets), default=0)
    known = _against(results, longest, or_equal=True) if longest > results.budget else []
    if known:
        good = [c.target for c in known if c.held]
        times = ratio(longest / results.budget)
        level = f"does not catch up at {_layers(good)}" if good else "is better"
        sentence += f" {theirs[0].upper()}{theirs[1:]} with {times} times the steps {level}."
    return sentence


def _against(results: Results, at: int | str, or_equal: bool = False) -> list[Comparison]:
    claim = PublishedClaim(text="", source="", chain=((results.main, "N"), (results.baseline, at)), or_equal=or_equal)
    return [c for c in compare(results, claim, "held_out_loss") if c.held is not None]


def _layers(depths: list[int]) -> str:
    names = [str(depth) for depth in depths]
    return f"{names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' and ' + names[-1]} layers"


def tiles(results: Results) -> list[tuple[str, str, str]]:
    """The key figures at the top of the page: (figure, description, details)."""
    figures = []
    ancestor = results.ancestors.get(results.main)
    for c in _against(results, "N") if results.budget and results.main and results.baseline else []:
        if c.left_value and c.right_value and results.budget:
            change = c.left_value.mean / c.right_value.mean - 1
            what = f"loss relative to {results.name_of(results.baseline)}, {c.target} layers"
            values = f"{number(c.left_value.mean)} and {number(c.right_value.mean)} after {results.budget:,} steps"
            figures.append((f"{change * 100:+.1f} %".replace("-", "−"), what, values))
    if ancestor:
        details = f"{ancestor.steps:,} steps, {ancestor.seconds:,.0f} s"
        details += f", held-out loss {number(ancestor.held_out_loss)}" if ancestor.held_out_loss is not None else ""
        figures.append((f"{ancestor.layers} layers", f"parent of the targets, {ancestor.name}", details))
        if ancestor.stored:
            dense = sum(results.target_params.get(t, 0) for t in results.targets)
            against = f"the dense targets hold {dense:,} together" if dense else ""
            figures.append((short(ancestor.stored), "numbers that targets start from", against))
    return figures


def about(results: Results) -> str:
    """A description of the study in a few sentences."""
    seeds = ", ".join(map(str, results.seeds))
    steps = ", ".join(f"{name} = {value:,}" for name, value in results.steps.items())
    parts = [f"{f'Data: {results.dataset}. ' if results.dataset else ''}Seeds {seeds}; {steps}. Lower is better."]
    if results.classifier_accuracy is not None and results.fd_samples:
        parts.append(
            f"Fréchet distances: {results.fd_samples:,} samples, features of a classifier that gets "
            f"{results.classifier_accuracy:.1%} of held-out images right."
        )
    parts += [left_out(results)] if left_out(results) else []
    parts += [f"Made by `{results.command}`."] if results.command else []
    return " ".join(parts)


def left_out(results: Results) -> str:
    """A sentence that names the series that are not published; empty where all are."""
    cut = [results.name_of(series) for series in results.tuning if series in results.unpublished]
    if not cut:
        return ""
    return f"Not published, because the best value lies at an end of the grid that was tried: {', '.join(cut)}."


def made(results: Results) -> str:
    """The number of measurements and seeds, and the time of the report."""
    created = f", {results.created}" if results.created else ""
    return f"{len(results.measurements):,} measurements, {seeds(results)}{created}"


def curves(results: Results) -> str:
    """Caption of the curves during training."""
    bands = " Bands are one standard deviation." if len(results.seeds) > 1 else ""
    caption = (
        "Mean squared error of the predicted noise on held-out data, at fixed timesteps and noise; means over "
        f"{seeds(results)}.{bands} Step 0 is the model before its first training step; values above the panel are not "
        "drawn."
    )
    if results.main and results.budget:
        ours = results.name_of(results.main)
        caption += f" The dashed level is the loss of {ours} after N = {results.budget:,} steps."
        init = {results.init_steps(results.main, t) for t in results.targets} - {0}
        if len(init) == 1:
            caption += f" Before its step 0, {ours} had {init.pop():,} steps of initialization."
    return caption


def bars(results: Results) -> str:
    """Caption of the Fréchet distances, including the distance of real images."""
    caption = "Lower is better. Pale bars had more or fewer than N training steps."
    caption += " Whiskers are one standard deviation over seeds." if len(results.seeds) > 1 else ""
    caption += f" {results.fd_samples:,} samples each." if results.fd_samples else ""
    if results.classifier_accuracy is not None:
        caption += f" Features of a classifier that gets {results.classifier_accuracy:.1%} of held-out images right."
    return f"{caption} {floor(results)}".strip()


def floor(results: Results) -> str:
    """Explanation of the distance between held-out real images and the training data; empty if not measured."""
    if results.fd_floor is None:
        return ""
    count = f"{results.fd_floor_samples:,} " if results.fd_floor_samples else ""
    sentence = f"The dashed line is the distance of {count}held-out real images to the training data."
    why = "models are trained on the very images that they are compared with"
    if results.fd_floor_samples and results.fd_samples and results.fd_floor_samples < results.fd_samples:
        why = f"a distance estimated from fewer images is larger, and models have {results.fd_samples:,}; also, {why}"
    return f"{sentence} It is no lower bound: {why}."


def depths(results: Results) -> str:
    """Caption of quality against depth."""
    spread = " Bands are one standard deviation over seeds." if len(results.seeds) > 1 else ""
    return f"Every series after the same number of training steps; initialization and stage 1 are not counted.{spread}"


def map_(results: Results) -> str:
    """Caption of quality against the length of training."""
    return (
        "Each point is the end of a run of that length, with the learning-rate schedule of that length. Horizontal "
        "distance between two series is the steps that one start saves over the other."
    )


def break_even(results: Results) -> str:
    """Caption of the total cost for n models."""
    return (
        f"Total FLOPs until n models of each depth reach the loss of {results.name_of(results.baseline)} after its "
        "longest run. Where two lines cross, the dearer start has paid for itself."
    )


def costs(results: Results) -> str:
    """Caption of quality against cost."""
    return (
        "Each line is one series during training. Its cost is everything spent so far: a whole stage 1, the training "
        "of ancestors and every step of initialization included. Shared cost is paid once for all targets; here each "
        "target bears all of it."
    )


def storage(results: Results) -> str:
    """Caption of the numbers stored."""
    return "A series that stores every target as a dense model is a line through the origin."


def pictures(results: Results) -> str:
    """Caption of the samples."""
    return (
        "Grids use the same noise and the same class labels, so images in the same position can be compared. Images "
        "of fewer than 32 pixels on a side are enlarged smoothly."
    )


def tables(results: Results) -> str:
    """Caption of the tables over depth."""
    first = next(iter(results.tables), "")
    return (
        f"{results.tables_note} Above: each component by layer, as its difference from the mean over layers (red "
        f"above, blue below), sorted by slope. Below: the first principal component of the {first} against relative "
        "depth, with a straight line for comparison; the targets are projected onto the same direction. r: "
        "correlation with depth."
    ).strip()


CAPTIONS: dict[str, Callable[[Results], str]] = {
    "curves": curves,
    "map": map_,
    "break_even": break_even,
    "bars": bars,
    "depths": depths,
    "costs": costs,
    "storage": storage,
    "pictures": pictures,
    "tables": tables,
}
"""Captions of figures by section."""
