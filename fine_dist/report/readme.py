"""The demo's picture and tables in README.md: `python -m fine_dist.report.readme runs/demo/report`.

The tables stand between comments and are computed from results.json, like every number of the report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.report import read_results, summary_png
from fine_dist.report.results import Results, label

SECTIONS = ("demo", "family")


def table(results: Results) -> str:
    """Markdown: held-out loss by depth, of FINE after its initialisation and after N steps, scratch after N and 3 N."""
    budgets = {results.budget(target) for target in results.targets}
    if len(budgets) != 1 or None in budgets:
        raise ValueError("the targets were not all trained for the same number of steps")
    n = budgets.pop() or 0
    init = results.init_steps(results.targets[0])
    columns = [
        (f"FINE: {init} sigma-only steps", "fine", 0),
        (f"FINE, then {n} steps", "fine", n),
        (f"scratch, {n} steps", "he", n),
        (f"scratch, {3 * n} steps", "he", 3 * n),
        (f"{label('outside')}, {n} steps", "outside", n),
    ]
    seeds = len(results.seeds)
    lines = [
        f"Held-out loss on scikit-learn's digits, mean of {seeds} seed{'s' if seeds > 1 else ''}"
        + (" ± standard deviation" if seeds > 1 else "")
        + f" (`python -m fine_dist demo --seeds {seeds}`; lower is better):",
        "",
        "| depth | " + " | ".join(name for name, _, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for target in results.targets:
        cells = []
        for _, series, step in columns:
            mean = results.mean(series, target, step)
            spread = f" ± {mean.spread:.4f}" if mean and mean.num > 1 else ""
            cells.append(f"{mean.mean:.4f}{spread}" if mean else "-")
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def family(results: Results) -> str:
    """Markdown: what the ancestor and each target cost to make and to store."""
    ancestor = results.ancestor
    if ancestor is None:
        raise ValueError("the report has no ancestor")
    lines = [
        "| | steps | seconds | numbers stored | as a dense model |",
        "|---|---|---|---|---|",
        f"| learngene, {ancestor.layers} layers | {ancestor.steps:,} | {ancestor.seconds:.0f} | "
        f"{ancestor.learngene_params:,} | {ancestor.params:,} |",
    ]
    scalers = 0
    for target in results.targets:
        table = results.sigmas[f"target {target}"]
        numbers = sum(len(row) for rows in table.values() for row in rows)
        scalers += numbers
        seconds = results.seconds("fine", target, 0)
        lines.append(
            f"| target, {target} layers | {results.init_steps(target)} | {seconds or 0:.0f} | {numbers:,} | "
            f"{results.target_params[target]:,} |"
        )
    dense = sum(results.target_params.values())
    stored = (ancestor.learngene_params or 0) + scalers
    lines += [
        "",
        f"Learngene and {len(results.targets)} sigmas: {stored:,} numbers; {len(results.targets)} dense models: "
        f"{dense:,} ({dense / stored:.1f} times as many). Seconds are means over {len(results.seeds)} seeds, "
        "one thread each; a target's are its share of its pack's.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Rewrite the tables in README.md and docs/demo.png from a report's folder."""
    [folder] = sys.argv[1:] if argv is None else argv
    root = Path(__file__).resolve().parents[2]
    results = read_results(folder)
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, content in zip(SECTIONS, (table(results), family(results))):
        begin, end = f"<!-- {name} table: begin -->\n", f"<!-- {name} table: end -->\n"
        head, _, rest = text.partition(begin)
        text = head + begin + content + end + rest.partition(end)[2]
    (root / "README.md").write_text(text, encoding="utf-8")
    (root / "docs").mkdir(exist_ok=True)
    print(summary_png(results, root / "docs" / "demo.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
