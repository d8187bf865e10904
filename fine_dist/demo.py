"""`python -m fine_dist demo`: the whole method on the embedded data set, with a report.

Shards -> condense an 8-layer ancestor -> initialise targets of several depths by training sigma alone -> train each ->
the same targets from scratch and a control -> evaluate -> a report. Every part is the ordinary command of that name,
run as a job of the local launcher; starting the demo again continues where it was.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_dist.cli import parse
from fine_dist.config import Config, dump_yaml, load_yaml, validate
from fine_dist.errors import TrainingError, guard

if TYPE_CHECKING:
    from launchers.base import Job

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"


class DemoConfig(Config):
    """The whole method on scikit-learn's digits (1,797 real scans, used as 1x8x8 latents), with a report."""

    run_dir: str = "runs/demo"
    """Where everything is written; the report lands in its `report/`."""
    seeds: int = Field(1, ge=1)
    """Seeds 0, 1, ... of the whole chain, learngene included; the report shows means and spread."""
    depths: tuple[int, ...] = (2, 4, 6)
    """Depths of the targets."""
    condense_steps: int = Field(1500, ge=1)
    """Stage 1."""
    init_steps: int = Field(300, ge=1)
    """Stage 2: sigma alone."""
    train_steps: int = Field(400, ge=1)
    """Stage 3, N: each target after initialisation. Scratch is trained N and 3 N steps."""
    samples: int = Field(500, ge=10)
    """Images drawn for each Fréchet distance."""
    controls: bool = True
    """Also train targets that inherit only what is outside the blocks."""
    parallel: int = Field(min(2, os.cpu_count() or 1), ge=1)
    """Jobs at once, a thread each."""


@dataclass
class Work:
    """One job of the demo and what must be done before it."""

    name: str
    module: str
    config: Config
    steps: int
    after: tuple[str, ...] = ()
    grows: str | None = None
    """The shorter run that this one goes on from: up to there the two are the same, bit for bit."""
    job: Job | None = None
    bar: Any = None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)  # type: ignore[attr-defined]


@dataclass
class Plan:
    """All jobs of the demo, in the order they are wanted."""

    config: DemoConfig
    works: list[Work] = field(default_factory=list)

    def add(
        self, name: str, stage: str, steps: int, after: tuple[str, ...] = (), grows: str | None = None, **changes: Any
    ) -> None:
        made = stage_config(self.config, stage, name, {"steps": steps, **changes})
        self.works.append(Work(name, f"fine_dist.{stage}", made, steps, after, grows))

    def __getitem__(self, name: str) -> Work:
        return next(work for work in self.works if work.name == name)


def plan(config: DemoConfig) -> Plan:
    """The jobs: the longest that wait for nothing come first, so that no core is idle at the end."""
    p, n = Plan(config), config.train_steps
    root = Path(config.run_dir)
    for seed in range(config.seeds):
        p.add(f"condense-s{seed}", "condense", config.condense_steps, seed=seed)
        for depth in sorted(config.depths, reverse=True):
            short, long = (f"he-L{depth}-n{steps}-s{seed}" for steps in (n, 3 * n))
            p.add(short, "train", n, seed=seed, arch={"num_layers": depth})
            p.add(long, "train", 3 * n, (short,), grows=short, seed=seed, arch={"num_layers": depth})
    for seed in range(config.seeds):
        learngene = str(root / f"condense-s{seed}" / "learngene")
        first = (f"condense-s{seed}",)
        p.add(
            f"init-s{seed}", "init", config.init_steps, first,
            learngene=learngene, depths=list(config.depths), seeds=[seed],
        )  # fmt: skip
        for depth in sorted(config.depths, reverse=True):
            start = str(target_folder(config, depth, seed))
            p.add(f"fine-L{depth}-s{seed}", "train", n, (f"init-s{seed}",), seed=seed, start=start, arch=None)
            if config.controls:
                p.add(
                    f"outside-L{depth}-s{seed}", "train", n, first, seed=seed,
                    arch={"num_layers": depth}, method={"name": "outside"}, learngene=learngene,
                )  # fmt: skip
    return p


def target_folder(demo: DemoConfig, depth: int, seed: int) -> Path:
    """Where `init` puts the target of this depth and seed."""
    from fine_dist.family import expand

    config: Any = stage_config(demo, "init", f"init-s{seed}", {"depths": demo.depths, "seeds": (seed,)})
    return next(member.folder for member in expand(config) if member.depth == depth)


def stage_config(demo: DemoConfig, stage: str, name: str, changes: dict[str, Any]) -> Config:
    """`configs/demo/STAGE.yaml` with the demo's own directory and changes."""
    import importlib

    module = importlib.import_module(f"fine_dist.{stage}")
    kind = getattr(module, f"{stage.capitalize()}Config")
    values = load_yaml(CONFIGS / f"{stage}.yaml")
    data = Path(demo.run_dir) / "data"
    values["data"] = {**values["data"], "shards": str(data / "train"), "held_out": str(data / "held_out")}
    values["run_dir"] = str(Path(demo.run_dir) / name)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key == "arch" else value
    return validate(kind, values, f"configs/demo/{stage}.yaml")


def run(config: DemoConfig) -> Path:
    """Run everything that is not done yet and write the report; returns its page."""
    from fine_dist import encode
    from fine_dist.demo_report import collect, train_features
    from fine_dist.report import summary_png, write_report

    begun = time.perf_counter()
    root = Path(config.run_dir)
    print(f"demo: files are in {root}; the same command continues if it is stopped", flush=True)
    encode.run(encode.EncodeConfig(source="digits", out=str(root / "data")))
    accuracy = train_features(root)
    print(f"features: a digits classifier, held-out accuracy {accuracy:.4f}", flush=True)
    p = plan(config)
    follow(p)
    results = collect(p, accuracy)
    page = write_report(root / "report", results)
    summary_png(results, root / "report" / "summary.png")
    print(f"\ndemo: {time.perf_counter() - begun:.0f} s; report: {page}; curves: tensorboard --logdir {root}")
    return page


def follow(p: Plan) -> None:
    """Run the jobs, each as soon as what it needs is done, with a progress bar for each that runs."""
    from launchers.local import LocalLauncher

    waiting = list(p.works)
    running: list[Work] = []
    with LocalLauncher(threads=1) as launcher, Bars() as bars:
        while waiting or running:
            for work in list(waiting):
                if len(running) < p.config.parallel and all(done(p, name) for name in work.after):
                    waiting.remove(work)
                    start(p, launcher, work)
                    running.append(work)
            launcher.poll()
            for work in list(running):
                bars.show(work)
                if work.job is not None and work.job.ended:
                    running.remove(work)
                    bars.end(work)
                    if work.job.state != "done":
                        words = "\n  ".join(launcher.logs(work.job).splitlines()[-5:])
                        raise TrainingError(f"{work.name}: {work.job.reason}; {work.job.log} ends with\n  {words}")
            time.sleep(0.1)


def done(p: Plan, name: str) -> bool:
    """Whether the job of this name has ended well."""
    job = p[name].job
    return job is not None and job.state == "done"


def start(p: Plan, launcher: Any, work: Work) -> None:
    from fine_dist.jobs.prepare import make_spec

    if work.grows and not work.run_dir.exists():
        inherit(p[work.grows].run_dir, work.run_dir)
    work.job = launcher.submit(make_spec(work.module, work.config, work.name))


def inherit(short: Path, run_dir: Path) -> None:
    """A run directory with the checkpoints and logs of a finished shorter run: the engine resumes from there."""
    import shutil

    half = run_dir.with_name(f".{run_dir.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    for name in ("checkpoints", "tensorboard"):
        shutil.copytree(short / name, half / name)
    shutil.copy(short / "metrics.jsonl", half)
    half.rename(run_dir)


class Bars:
    """One progress bar a running job, read from its metrics.jsonl: step, loss, rate and time left."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description:18}"), BarColumn(28), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self.all = self.progress.add_task("all jobs", total=None, facts="")

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, work: Work) -> None:
        if work.bar is None:
            work.bar = self.progress.add_task(work.name, total=work.steps, facts="")
        row = last_row(work)
        if row:
            facts = f"loss {row['loss']:.4f}  {row['steps_per_s']:.1f} step/s"
            self.progress.update(work.bar, completed=min(row["step"], work.steps), facts=facts)

    def end(self, work: Work) -> None:
        self.progress.update(work.bar, visible=False)
        self.progress.advance(self.all)
        self.progress.console.print(f"  {work.name:18} {work.steps:5} steps  -> {work.run_dir}", highlight=False)


def last_row(work: Work) -> dict[str, Any] | None:
    """The newest row with a training loss in the job's metrics.jsonl, or in those of its tasks."""
    from fine_dist.demo_report import metrics

    files = [work.run_dir / "metrics.jsonl", *work.run_dir.glob("*/metrics.jsonl")]
    rows = [row for file in files for row in metrics(file)[-2:] if "loss" in row and "steps_per_s" in row]
    return max(rows, key=lambda row: row["step"], default=None)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(DemoConfig, argv, "python -m fine_dist demo")
        if call.dry_run:
            for work in plan(call.config).works:
                print(
                    f"{work.name:18} {work.module:20} {work.steps:5} steps after {', '.join(work.after) or 'nothing'}"
                )
            print(dump_yaml(call.config) + "\ndry run: nothing was done")
            return 0
        run(call.config)
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
