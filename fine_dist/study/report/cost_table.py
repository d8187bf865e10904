"""The arithmetic of cost: what "fewer steps, less storage" comes to on these rows."""

from __future__ import annotations

from fine_dist.study.report.results import Results


def arithmetic(results: Results) -> list[tuple[str, str]]:
    """(what, sentence) for steps and storage of the main series beside the baseline; from counts alone."""
    lines = []
    trained = {target: results.trained_steps(results.main, target) for target in results.targets}
    known = {target: n for target, n in trained.items() if n}
    ancestor = results.ancestors.get(results.main)
    longest = {t: n for t in known if (n := results.trained_steps(results.baseline, t))}
    if known and ancestor and longest.keys() == known.keys():
        own = sum(n + results.init_steps(results.main, t) for t, n in known.items())
        ours, theirs = ancestor.steps + own, sum(longest.values())
        lines.append(
            (
                "steps",
                f"{len(known)} targets: {ancestor.steps:,} steps once, then {own:,} for all targets = {ours:,}; "
                f"{results.label(results.baseline)} with {ratio(theirs / sum(known.values()))} N each: {theirs:,}, "
                f"{theirs / ours:.2f} times that. The first part is paid once, however many targets follow.",
            )
        )
    full = sum(results.target_params.get(t, 0) for t in results.targets)
    if full and ancestor and ancestor.stored:
        lines.append(
            (
                "storage",
                f"what targets start from holds {ancestor.stored:,} numbers, the {len(results.targets)} full models "
                f"{full:,} ({full / ancestor.stored:.2f} times as many)",
            )
        )
    return lines


def ratio(value: float) -> str:
    """`3`, `2.5`."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def short(value: float) -> str:
    """`134 K`, `1.2 G`, `3.1 T`: four digits at most."""
    for size, unit in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
