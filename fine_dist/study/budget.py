"""What a study would take, before anything is run: FLOPs of every run, hours, and hours of accelerators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fine_dist.core.config import validate
from fine_dist.planning.estimates import ASSUMED_TFLOPS
from fine_dist.study import settings
from fine_dist.study.config import StudyConfig
from fine_dist.study.graph import Graph, Run, plan
from fine_dist.study.tune import trials

CORE_GFLOPS = 40.0
"""What is supposed of one CPU core: about 60 ms for a step of 64 samples through 8 layers of width 64, 16 tokens."""
BEGIN_S = 2.0
"""Seconds that a run on a CPU takes beside its steps: it starts, measures and saves."""


@dataclass(frozen=True)
class Estimate:
    """Of a whole graph."""

    runs: int
    flops: float
    machine_hours: float
    """Of accelerators, or of CPU cores where a study asks for none."""
    hours: float
    """At the study's width (`launch.max_parallel`; none: everything at once that may be), no shorter than the longest
    chain of runs that wait for each other."""
    accelerators: bool

    def line(self, what: str) -> str:
        unit = "GPU-hours" if self.accelerators else "core-hours"
        rate = f"{ASSUMED_TFLOPS:g} TFLOP/s an accelerator" if self.accelerators else f"{CORE_GFLOPS:g} GFLOP/s a core"
        return (
            f"{what}: {self.runs} runs, {self.flops:.3g} FLOPs, {self.hours:.3g} hours, {self.machine_hours:.3g} "
            f"{unit} (supposing {rate}; encoding and measuring not counted)"
        )


def estimate(study: StudyConfig, graph: Graph | None = None) -> Estimate:
    """Of the study's runs, or of those of another graph of it, whatever is done already."""
    graph = graph or plan(study)
    launch, accelerators = study.launch, study.launch.gpus > 0
    workers = launch.nodes * launch.processes if accelerators else 1
    hours, flops = {}, {}
    for run in graph.runs:
        flops[run.name] = run_flops(study, graph, run)
        rate = workers * ASSUMED_TFLOPS * 1e12 if accelerators else CORE_GFLOPS * 1e9
        hours[run.name] = flops[run.name] / rate / 3600 + (0.0 if accelerators else BEGIN_S / 3600)
    total = sum(hours.values())
    chain: dict[str, float] = {}

    def longest(name: str) -> float:
        if name not in chain:
            chain[name] = hours[name] + max((longest(before) for before in graph[name].after), default=0.0)
        return chain[name]

    least = max((longest(run.name) for run in graph.runs), default=0.0)
    wide = launch.max_parallel
    return Estimate(
        runs=len(graph.runs),
        flops=sum(flops.values()),
        machine_hours=total * workers,
        hours=max(least, total / wide) if wide else least,
        accelerators=accelerators,
    )


def tuning_estimate(study: StudyConfig) -> Estimate | None:
    """Of what tuning takes; none where nothing is tried."""
    if not study.tune:
        return None
    graph, tried = trials(study)
    return estimate(study, graph) if tried else None


def run_flops(study: StudyConfig, graph: Graph, run: Run) -> float:
    """FLOPs of one run, forward and backward: stage 1 as its method counts them, a dense model's otherwise; a run that
    goes on from a shorter one has its own part alone."""
    from fine_dist.model.arch import Arch

    if run.module == settings.MODULES["encode"]:
        return 0.0
    stage_1: Any = settings.stage_1_flops(run.config)
    steps = run.steps - (graph[run.grows].steps if run.grows else 0)
    if stage_1 is not None:
        return steps * run.config.batch * stage_1
    base = run.config.arch or validate(Arch, study.stages["train"]["arch"], "stages.train.arch")
    return sum(steps * run.config.batch * settings.step_flops(base.with_depth(depth)) for depth in run.depths)
