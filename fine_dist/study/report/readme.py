"""A study's picture and tables in README.md: `python -m fine_dist.study.report.readme runs/demo/report`.

The tables stand between comments and are computed from results.json, like every number of the report.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fine_dist.core.errors import ArtifactError, guard
from fine_dist.study.report import summary_png
from fine_dist.study.report.results import Mean, Results, read_results


def table(results: Results) -> str:
    """Markdown: held-out loss by depth: main series after initialisation and N steps, then the others at N and last."""
    n = results.budget
    if not n or not results.targets:
        raise ArtifactError("these results have no N, or no rows: a table of losses after N steps cannot be made")
    columns = []
    for series in results.series:
        if ":" in series:
            continue
        name = results.label(series)
        init = max(results.init_steps(series, t) for t in results.targets)
        last = max(results.trained_steps(series, t) for t in results.targets)
        if init and series == results.main:
            columns.append((f"{name}: {init} initialisation steps", series, 0))
        columns.append((f"{name}, then {n} steps" if init else f"{name}, {n} steps", series, n))
        if last > n:
            columns.append((f"{name}, {last} steps", series, last))
    seeds = len(results.seeds)
    lines = [
        f"Held-out loss{f' on {results.dataset}' if results.dataset else ''}, mean of {seeds} seed"
        + ("s ± standard deviation" if seeds > 1 else "")
        + f" ({f'`{results.command}`; ' if results.command else ''}lower is better):",
        "",
        "| depth | " + " | ".join(name for name, _, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for target in results.targets:
        cells = [_cell(results.mean(series, target, step)) for _, series, step in columns]
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return "-"
    return f"{mean.mean:.4f}" + (f" ± {mean.spread:.4f}" if mean.num > 1 else "")


def family(results: Results) -> str:
    """Markdown: what the main series' ancestor and each target cost to make and to store."""
    ancestor = results.ancestors.get(results.main)
    if ancestor is None:
        raise ArtifactError("these results say nothing of what the targets come from")
    lines = [
        "| | steps | seconds | numbers stored | as a dense model |",
        "|---|---|---|---|---|",
        f"| learngene, {ancestor.layers} layers | {ancestor.steps:,} | {ancestor.seconds:.0f} | "
        f"{ancestor.stored or 0:,} | {ancestor.params or 0:,} |",
    ]
    own = 0
    for target in results.targets:
        numbers = max(row.stored for row in results.at(results.main, target, 0))
        own += numbers
        seconds = results.seconds(results.main, target, 0)
        lines.append(
            f"| target, {target} layers | {results.init_steps(results.main, target)} | {seconds or 0:.0f} | "
            f"{numbers:,} | {results.target_params[target]:,} |"
        )
    dense = sum(results.target_params.values())
    stored = (ancestor.stored or 0) + own
    lines += [
        "",
        f"Learngene and {len(results.targets)} initialised targets: {stored:,} numbers; {len(results.targets)} dense "
        f"models: {dense:,} ({dense / stored:.1f} times as many). Seconds are means over {len(results.seeds)} seeds, "
        "one thread each; a target's are its share of its pack's.",
    ]
    return "\n".join(lines) + "\n"


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the comments of a table's name replaced. `ArtifactError` without them."""
    begin, end = f"<!-- {name} table: begin -->\n", f"<!-- {name} table: end -->\n"
    head, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise ArtifactError(f"no place for the {name} table: add the lines {begin.strip()} and {end.strip()}")
    return head + begin + content + end + rest.partition(end)[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables in README.md and docs/demo.png from a report's folder."""

    def body() -> int:
        [folder] = sys.argv[1:] if argv is None else argv
        root = Path(__file__).resolve().parents[3]
        results = read_results(folder)
        text = (root / "README.md").read_text(encoding="utf-8")
        for name, content in (("demo", table(results)), ("family", family(results))):
            text = fill(text, name, content)
        (root / "README.md").write_text(text, encoding="utf-8")
        print(summary_png(results, root / "docs" / "demo.png"))
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
