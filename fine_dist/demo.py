"""`python -m fine_dist demo`: the whole method on the embedded digits, as a study of about five minutes.

An ancestor is trained and condensed; models of two depths start from the learngene, beside pruning and training from
scratch; samples and losses are compared. Every part is the ordinary command of its name, run as a job, and the same
command resumes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from fine_dist.core.arguments import parse
from fine_dist.core.config import Config, PathKey, dump_yaml
from fine_dist.core.errors import guard
from fine_dist.core.limits import num_cores
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.study.config import StudyConfig, load_study

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
    diffusion: DiffusionConfig = DiffusionConfig()
    """The process that all models are trained for, such as `--diffusion.process flow`. Its images are sampled by the
    process's own deterministic solver."""
    parallel: int = Field(min(2, num_cores()), ge=1, le=4096)
    """Jobs that run at the same time, each on one CPU thread."""


def study_of(config: DemoConfig) -> StudyConfig:
    """The demo's study with the demo's settings."""
    changes: dict[str, Any] = {}
    flags = f" --seeds {config.seeds}" if config.seeds > 1 else ""
    diffusion = config.diffusion.model_dump(exclude_defaults=True)
    if diffusion:
        stage, sampler = {"diffusion": diffusion}, {"scheduler": "auto"}
        sampling_stage = {**stage, "sampler": sampler}
        changes = {"sampler": sampler, "stages": {"condense": sampling_stage, "init": stage, "train": sampling_stage}}
        flags += "".join(f" --diffusion.{key.replace('_', '-')} {value}" for key, value in diffusion.items())
    return load_study(
        config.study or STUDY,
        run_dir=config.run_dir,
        command=f"python -m fine_dist demo{flags}",
        **changes,
        seeds=list(range(config.seeds)),
        steps=config.steps,
        samples=config.samples,
        controls=config.controls,
        launch={"max_parallel": config.parallel},
    )


def run(config: DemoConfig, launcher: str = "auto") -> Path:
    """Run everything that is not done yet, print the results and write the report; returns the path of its page."""
    from fine_dist.study.report.headline import show
    from fine_dist.study.running import results_of

    start = time.perf_counter()
    study = study_of(config)
    results = results_of(study, launcher)
    return show(results, study.root / "report", time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def body() -> int:
        call = parse(DemoConfig, argv, "fine-dist demo")
        if call.dry_run:
            from fine_dist.study.running import outline

            print("\n".join([*outline(study_of(call.config)), dump_yaml(call.config).rstrip()]))
            print("dry run: nothing was done")
            return 0
        run(call.config, call.launcher)
        print("next: fine-dist study --template mine.yaml")
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
