"""`python -m fine_dist demo`: the whole method on the embedded data set, with a report. The smallest study.

Shards -> condense an 8-layer ancestor -> initialise targets of several depths -> train each -> the same targets from
scratch and a control -> measure -> a report. Every part is the ordinary command of that name, run as a job; starting
the demo again continues where it was.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pydantic import Field

from fine_dist.core.arguments import parse
from fine_dist.core.config import Config, dump_yaml
from fine_dist.core.errors import guard
from fine_dist.study import outline, run_study
from fine_dist.study.config import StudyConfig, load_study

STUDY = "configs/study/digits_demo.yaml"


class DemoConfig(Config):
    """The whole method on scikit-learn's digits (1,797 real scans, used as 1x8x8 latents), with a report."""

    study: str | None = None
    """Study file to run in place of the demo's own; the settings below are laid over it."""
    run_dir: str = "runs/demo"
    """Folder for everything that is written; the report is in its `report/`."""
    seeds: int = Field(1, ge=1)
    """Number of seeds of the whole chain, learngene included; with several, the report shows means and spread."""
    depths: tuple[int, ...] = (2, 4, 6)
    """Depths (numbers of layers) of the models that are initialized from the learngene."""
    condense_steps: int = Field(1500, ge=1)
    """Updates of stage 1, which condenses the ancestor into the learngene."""
    init_steps: int = Field(300, ge=1)
    """Updates of stage 2, which trains only the scalers of each target."""
    train_steps: int = Field(400, ge=1)
    """Updates N of stage 3, which trains each target as a whole; models from scratch are trained N and 3 N steps."""
    samples: int = Field(500, ge=10)
    """Images that are sampled from each model for its Fréchet distance."""
    controls: bool = True
    """Also train the control: models that inherit the embedders and the final layer, with random blocks."""
    parallel: int = Field(min(2, os.cpu_count() or 1), ge=1)
    """Jobs that run at the same time, each on one CPU thread."""


def study_of(config: DemoConfig) -> StudyConfig:
    """The demo's study with the demo's settings."""
    return load_study(
        config.study or STUDY,
        run_dir=config.run_dir,
        command=f"fine-dist demo{f' --seeds {config.seeds}' if config.seeds > 1 else ''}",
        seeds=list(range(config.seeds)),
        depths=list(config.depths),
        steps={"C": config.condense_steps, "I": config.init_steps, "N": config.train_steps},
        samples=config.samples,
        controls=config.controls,
        launch={"max_parallel": config.parallel},
    )


def run(config: DemoConfig, launcher: str = "auto") -> Path:
    """Run everything that is not done yet and write the report; returns its page."""
    begun = time.perf_counter()
    print(f"demo: files are in {config.run_dir}; the same command continues if it is stopped", flush=True)
    page = run_study(study_of(config), launcher)
    seconds = time.perf_counter() - begun
    print(f"\ndemo: {seconds:.0f} s; report: {page}; curves: tensorboard --logdir {config.run_dir}")
    return page


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
