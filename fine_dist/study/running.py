"""Run a study, from its table to its report.

    study = load_study("configs/study/digits_demo.yaml", seeds=[0, 1, 2])
    page = run_study(study, launcher="auto")

The same call again resumes: it runs only the runs that are not done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fine_dist.core.files import write_atomic
from fine_dist.launchers.state_table import StateTable
from fine_dist.planning.devices import CORE_GFLOPS
from fine_dist.study.budget import estimate, tuning_estimate
from fine_dist.study.collect_results import collect_results
from fine_dist.study.config import StudyConfig
from fine_dist.study.graph import Graph, plan
from fine_dist.study.measuring import check_features
from fine_dist.study.report.claims import verdicts
from fine_dist.study.report.render import markdown, page, page_report, write_report
from fine_dist.study.report.results import Results
from fine_dist.study.scheduler import follow
from fine_dist.study.tune import tune_study


def run_study(study: StudyConfig, launcher: str = "auto", echo: bool = True) -> Path:
    """Run all runs that are not done, measure the models and write the report.

    Args:
        study: The study.
        launcher: `local`, `slurm`, `ray`, `auto`, or `here` (this process).
        echo: Whether the report's table is printed as well.

    Returns:
        The path of the report's page.

    Raises:
        RunDirError: Another live process runs this study.
        TrainingError: Some runs failed. It is raised after all other runs have ended, with the ends of the logs.
    """
    return write_report(study.root / "report", results_of(study, launcher), echo=echo)


def results_of(study: StudyConfig, launcher: str = "auto") -> Results:
    """Run all runs that are not done, tuning first, and measure the models.

    Raises:
        RunDirError: Another live process runs this study.
        TrainingError: As `run_study` raises it.
    """
    check_features(study)
    # Two processes would submit the same runs, and each would report the other's as failed.
    with StateTable(study.root.absolute()).driver("study"):
        tuned, tried = tune_study(study, launcher)
        graph = plan(tuned)
        follow(graph, launcher)
        results = collect_results(graph)
    results.tuning = tried
    return results


def run_studies(studies: dict[str, StudyConfig], launcher: str = "auto", echo: bool = True) -> dict[str, Results]:
    """Run several studies, and write a report of each and one of all. Raises as `run_study` does."""
    for study in studies.values():
        plan(study)  # errors of the plan are raised before anything runs
    results = {name: results_of(study, launcher) for name, study in studies.items()}
    root = next(iter(studies.values())).root.parent
    shown = {name: page_report(part) for name, part in results.items()}
    pages = [
        write_report(studies[name].root / "report", part, shown=shown[name], echo=echo)
        for name, part in results.items()
    ]
    content = {
        "rows": [row for name, part in results.items() for row in rows_of(name, part)],
        "verdicts": {name: [verdict.as_json() for verdict in verdicts(part)] for name, part in results.items()},
    }
    write_atomic(root / "results.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_atomic(root / "results.md", "\n".join(markdown(part) for part in results.values()))
    write_atomic(root / "report.html", page(*shown.values()))
    print(f"report: {pages[0] if len(pages) == 1 else root / 'report.html'}", flush=True)
    print("next: the same command with more methods, depths or seeds runs only what is new", flush=True)
    return results


def rows_of(part: str, results: Results) -> list[dict[str, Any]]:
    """One row per method, target, seed and length of training, with quality and cost.

    `flops` includes the training of ancestors and the forward passes of teachers; `own_flops` counts only the target's
    own stages. `steps` are training steps after initialization.
    """
    rows = []
    for m in results.measurements:
        if m.stage != "train" or m.step not in results.reported_steps(m.series, m.target):
            continue
        rows.append(
            {
                "part": part,
                "method": m.method,
                "display_name": results.name_of(m.series),
                "target": m.target,
                "seed": m.seed,
                "steps": m.step,
                "published": m.series not in results.unpublished,
                "held_out_loss": m.held_out_loss,
                "fd_classifier": m.fd_classifier,
                "accuracy": m.accuracy,
                "stored": m.stored,
                "trained": m.trained,
                "flops": m.flops + m.flops_condense,
                "own_flops": m.flops,
                "flops_ancestor": m.flops_ancestor,
                "steps_init": m.steps_init,
                "steps_before": m.steps_condense,
                "samples": m.samples + m.samples_condense,
                "seconds": m.seconds + m.seconds_condense,
            }
        )
    return rows


def describe(studies: dict[str, StudyConfig], gflops: float | None = None, runs: bool = True) -> list[str]:
    """Lines with every run of every study and the estimated costs.

    Args:
        studies: The studies.
        gflops: Measured GFLOP/s of a core; None: assumed.
        runs: Whether the runs are listed.
    """
    rate, lines = gflops or CORE_GFLOPS, []
    for name, study in studies.items():
        steps = ", ".join(f"{symbol} = {value:,}" for symbol, value in study.steps.items())
        lines.append(f"{name}: {study.title}; {steps} steps")
        graph = plan(study)
        lines += outline(study, graph) if runs else []
        tuning = tuning_estimate(study, rate)
        lines += [tuning.line(f"{name}, tuning")] if tuning else []
        lines.append(estimate(study, graph, rate).line(name))
    return lines


def outline(study: StudyConfig, graph: Graph | None = None) -> list[str]:
    """One line per run: name, module, steps and the runs it needs."""
    runs = (graph or plan(study)).runs
    width = max(len(run.name) for run in runs)
    return [
        f"{run.name:{width}} {run.module:20} {run.steps:5} steps after {', '.join(run.after) or 'nothing'}"
        + (" (done)" if run.done else "")
        for run in runs
    ]
