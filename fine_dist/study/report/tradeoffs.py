"""Pictures of what quality costs: held-out loss against depth and against FLOPs, and numbers stored."""

from __future__ import annotations

import numpy as np

from fine_dist.study.report.canvas import FAINT, figure_of, key, svg_of
from fine_dist.study.report.cost_table import short
from fine_dist.study.report.figures import colour
from fine_dist.study.report.results import Results
from fine_dist.study.report.storage import storage


def depths_svg(results: Results) -> str | None:
    """Held-out loss after N steps against depth. None for fewer than two depths, or without N."""
    n = results.budget
    lines = {s: {t: m for t in results.targets if n and (m := results.mean(s, t, n))} for s in results.series}
    lines = {series: points for series, points in lines.items() if points}
    if len({t for points in lines.values() for t in points}) < 2:
        return None
    with figure_of(1, 9.4, 3.4) as (figure, axes):
        axis = axes[0]
        for series, points in reversed(lines.items()):
            means, spreads = ([getattr(m, name) for m in points.values()] for name in ("mean", "spread"))
            lw = 2.2 if series in (results.main, results.baseline) else 1.4
            axis.errorbar(list(points), means, yerr=spreads, color=colour(series, results), lw=lw, marker="o", ms=4,
                          capsize=2.5, label=results.label(series))  # fmt: skip
        axis.set_xticks(results.targets)
        axis.set_xlabel("layers")
        axis.set_ylabel(f"held-out loss after {n:,} steps")
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        handles, names = axis.get_legend_handles_labels()
        key(figure, axis, handles[::-1], names[::-1], "best")
        return svg_of(figure, "depths", "Held-out loss after N steps against depth, by series")


def costs_svg(results: Results) -> str | None:
    """Held-out loss against everything spent, in FLOPs, a panel a depth. None when fewer than two series have costs."""
    costed = [r for r in results.rows if r.stage == "train" and r.flops + r.flops_condense > 0]
    targets = sorted({r.target for r in costed})
    if len({r.series for r in costed}) < 2:
        return None
    with figure_of(len(targets), 3.9, 3.5) as (figure, axes):
        for axis, target in zip(axes, targets):
            for series in reversed(results.series):
                points: dict[float, list[float]] = {}
                for row in costed:
                    if (row.series, row.target) == (series, target) and row.step:
                        points.setdefault(row.flops + row.flops_condense, []).append(row.held_out_loss)
                if points:
                    spent = sorted(points)
                    losses = [float(np.mean(points[at])) for at in spent]
                    lw = 2.2 if series in (results.main, results.baseline) else 1.4
                    axis.plot(spent, losses, color=colour(series, results), lw=lw, marker="o", ms=2.6,
                              label=results.label(series))  # fmt: skip
            axis.set_xscale("log", subs=[2, 5])
            axis.xaxis.set_major_formatter(lambda value, _: short(value))
            axis.xaxis.set_minor_formatter(lambda value, _: short(value))
            axis.set_title(f"{target} layers")
            axis.grid(axis="y")
            axis.set_axisbelow(True)
            axis.set_xlabel("FLOPs spent in all")
        axes[0].set_ylabel("held-out loss")
        handles, names = axes[0].get_legend_handles_labels()
        key(figure, axes[0], handles[::-1], names[::-1], "best")
        return svg_of(figure, "costs", "Held-out loss against FLOPs spent in all stages, by depth")


def storage_svg(results: Results) -> str | None:
    """Numbers stored against the number of initialised targets. None when no series shares anything."""
    found = storage(results)
    if len(found) < 2:
        return None
    target, whole = max(results.target_params), found[0].own
    lines = {kept.series: (kept.shared, kept.own) for kept in found[1:]}
    counts = np.arange(0, 11)
    with figure_of(1, 9.4, 3.0) as (figure, axes):
        axis = axes[0]
        axis.plot(counts, counts * whole, color=FAINT, lw=1.4, ls=(0, (4, 3)), label="stored whole")
        for series, (shared, own) in lines.items():
            axis.plot(
                counts,
                shared + counts * own,
                color=colour(series, results),
                lw=2 if series == results.main else 1.2,
                label=results.label(series),
            )
        axis.yaxis.set_major_formatter(lambda value, _: short(value))
        axis.set_xlabel(f"targets of {target} layers")
        axis.set_ylabel("numbers stored")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
        handles, names = axis.get_legend_handles_labels()
        key(figure, axis, handles, names, "upper left")
        return svg_of(figure, "storage", "Numbers stored against the number of targets")
