"""Studies: a table of entries x depths x seeds as data, the graph of runs it becomes, and what came out.

    study = load_study("configs/study/digits_demo.yaml", seeds=[0, 1, 2])
    page = run_study(study, launcher="auto")

The same call again runs only what is not done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fine_dist.study.config import Entry, Stage, StudyConfig, load_study
from fine_dist.study.graph import Graph, Run, plan

if TYPE_CHECKING:
    from fine_dist.study.report.results import Results


def run_study(study: StudyConfig, launcher: str = "auto") -> Path:
    """Run everything that is not done yet, measure it and write the report; the path of its page.

    Raises `TrainingError` naming the runs that failed, with the ends of their logs, after all others have ended.
    """
    from fine_dist.study.report import summary_png, write_report

    results = results_of(study, launcher)
    page = write_report(study.root / "report", results)
    if any(len(results.points(s, t)) > 1 for s in results.series for t in results.targets):
        summary_png(results, study.root / "report" / "summary.png")
    return page


def results_of(study: StudyConfig, launcher: str = "auto") -> Results:
    """Run everything that is not done yet, tuning first, and measure it. `TrainingError` as `run_study`."""
    from fine_dist.study.collect import collect
    from fine_dist.study.environment import check_features
    from fine_dist.study.scheduler import follow
    from fine_dist.study.tune import tuned

    check_features(study)
    chosen, tried = tuned(study, launcher)
    graph = plan(chosen)
    follow(graph, launcher)
    results = collect(graph)
    results.tuning = tried
    return results


def outline(study: StudyConfig) -> list[str]:
    """A line a run: name, module, steps and what it waits for."""
    runs = plan(study).runs
    wide = max(len(run.name) for run in runs)
    return [
        f"{run.name:{wide}} {run.module:20} {run.steps:5} steps after {', '.join(run.after) or 'nothing'}"
        + (" (done)" if run.done else "")
        for run in runs
    ]


__all__ = ["Entry", "Graph", "Run", "Stage", "StudyConfig", "load_study", "outline", "plan", "results_of", "run_study"]
