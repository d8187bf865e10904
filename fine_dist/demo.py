"""`python -m fine_dist demo`: the whole method on the embedded digits, as a study of four minutes.

An ancestor is trained and condensed; models of two depths start from the learngene, beside pruning and training from
scratch; samples and losses are compared. Every part is the ordinary command of its name, run as a job, and the same
command resumes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from fine_dist.core.arguments import parse
from fine_dist.core.config import Config, PathKey, dump_yaml
from fine_dist.core.errors import guard
from fine_dist.core.limits import num_cores
from fine_dist.study import outline, results_of
from fine_dist.study.config import StudyConfig, load_study

if TYPE_CHECKING:
    from fine_dist.study.report.results import Results

STUDY = "configs/study/digits_demo.yaml"


class DemoConfig(Config):
    """The whole method on scikit-learn's digits (1,797 scans of 8 x 8 pixels): train an ancestor, condense it, make
    models of other depths from it, and compare them with pruning and with training from scratch."""

    study: PathKey | None = None
    """Study file to run in place of the demo's own; the settings below are laid over it."""
    run_dir: PathKey = "runs/demo"
    """Folder for everything that is written; the report is in its `report/`."""
    seeds: int = Field(1, ge=1, le=1_000)
    """Number of seeds of the whole chain, ancestor included; with several, the report shows means and spread."""
    steps: dict[str, int] = Field(default_factory=dict)
    """Steps that differ from the study's: A of the ancestor, C of stage 1, I of stage 2 and N of the training after it,
    such as A=600 N=100. Default: those of the study."""
    samples: int = Field(500, ge=10, le=10_000_000)
    """Images that are sampled from each model for its Fréchet distance and its accuracy."""
    controls: bool = True
    """Whether to train the control as well: models that inherit the ancestor's embedders and final layer alone."""
    parallel: int = Field(min(2, num_cores()), ge=1, le=4096)
    """Jobs that run at the same time, each on one CPU thread."""


def study_of(config: DemoConfig) -> StudyConfig:
    """The demo's study with the demo's settings."""
    return load_study(
        config.study or STUDY,
        run_dir=config.run_dir,
        command=f"python -m fine_dist demo{f' --seeds {config.seeds}' if config.seeds > 1 else ''}",
        seeds=list(range(config.seeds)),
        steps=config.steps,
        samples=config.samples,
        controls=config.controls,
        launch={"max_parallel": config.parallel},
    )


def run(config: DemoConfig, launcher: str = "auto") -> Path:
    """Run everything that is not done yet, print what came out, and write the report; returns its page."""
    # drawing and tables need matplotlib and rich, which `--help` does not
    from rich.console import Console

    from fine_dist.study.report import write_report
    from fine_dist.study.report.claims import HELD, MISSING, verdicts
    from fine_dist.study.report.posters import save_poster
    from fine_dist.study.report.render import print_table
    from fine_dist.study.report.tables import rows

    begun = time.perf_counter()
    study = study_of(config)
    results = results_of(study, launcher)
    page = write_report(study.root / "report", results, echo=False)
    picture = save_poster("samples", results, study.root / "report" / "samples.png")
    console = Console()
    for line in headline(results):
        console.print(line, highlight=False, markup=False)
    print_table(rows(results).without("FLOPs", "Fréchet distance", "seconds"), console)
    outcomes = [verdict.plain for verdict in verdicts(results) if verdict.plain != MISSING]
    console.print(f"picture: {picture}", soft_wrap=True)
    spent, held = time.perf_counter() - begun, outcomes.count(HELD)
    console.print(
        f"report:  {page} ({spent:.0f} s; {held} of {len(outcomes)} published claims hold here)",
        soft_wrap=True,
        highlight=False,
    )
    return page


def headline(results: Results) -> list[str]:
    """What a reader should take away, in four sentences computed from the measurements of one depth."""
    from fine_dist.study.report.results import number, ratio
    from fine_dist.study.report.worth import end_curve, steps_to_reach

    main, baseline = results.main, results.baseline
    targets = [t for t in results.targets if results.ends(baseline, t)]
    target = targets[len(targets) // 2]
    start = results.mean(main, target, 0)
    if start is None:
        return []
    ours, theirs = results.name_of(main), results.name_of(baseline)
    steps = results.init_steps(main, target)
    trained = max(m.trained for m in results.at(main, target, 0))
    lines = [
        f"{target} layers: {ours} after {steps:,} steps of {trained:,} scalers: loss {number(start.mean)}"
        + _accuracy(results, main, target, 0)
        + "."
    ]
    untrained = results.mean(f"{main}:untrained", target, 0)
    if untrained is not None:
        shown = _accuracy(results, f"{main}:untrained", target, 0)
        lines.insert(0, f"{target} layers: {ours} without any training: loss {number(untrained.mean)}{shown}.")
    curve = end_curve(results, baseline, target)
    reached = steps_to_reach(curve, start.mean)
    last = curve.steps[-1]
    if reached is None:
        need = f"does not reach that loss in {last:,} steps ({number(curve.losses[-1])}"
    else:
        times = ratio(round(reached / steps, 1))
        need = f"needs {reached:,.0f} steps of the whole model for that loss, {times} times as many (after {last:,}: "
        need += number(curve.losses[-1])
    lines.append(f"{theirs[0].upper()}{theirs[1:]} {need}{_accuracy(results, baseline, target, last)}).")
    n = results.budget or 0
    losses = [(mean.mean, s) for s in results.series if ":" not in s and (mean := results.mean(s, target, n))]
    best, winner = min(losses)
    lines.append(f"Best after {n:,} training steps: {results.name_of(winner)} ({number(best)}).")
    return lines


def _accuracy(results: Results, series: str, target: int, step: int) -> str:
    mean = results.mean(series, target, step, "accuracy")
    return f", {mean.mean:.0%} of its digits are recognized" if mean else ""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(DemoConfig, argv, "fine-dist demo")
        if call.dry_run:
            print("\n".join([*outline(study_of(call.config)), dump_yaml(call.config).rstrip()]))
            print("dry run: nothing was done")
            return 0
        run(call.config, call.launcher)
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
