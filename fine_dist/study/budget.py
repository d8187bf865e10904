"""The estimated cost of a study before it runs: FLOPs of every run, hours, and hours of accelerators."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass

import torch

from fine_dist.core.config import validate
from fine_dist.core.logs import duration
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.planning.devices import ASSUMED_TFLOPS, CORE_GFLOPS
from fine_dist.study import settings
from fine_dist.study.config import StudyConfig
from fine_dist.study.graph import Graph, StudyRun, plan
from fine_dist.study.tune import trials

OVERHEAD_S = 3.5
"""Seconds of a run on a CPU in addition to its steps, for starting, measuring and saving; measured on a slow core."""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a graph of runs."""

    runs: int
    flops: float
    machine_hours: float
    """Hours of accelerators, or of CPU cores if the study uses no accelerators."""
    hours: float
    """Hours with `launch.max_parallel` runs at once (None: all that are ready); at least the duration of the longest
    chain of dependent runs."""
    accelerators: bool
    gflops: float
    """GFLOP/s of one CPU core, assumed or measured, for studies without accelerators."""

    def line(self, what: str) -> str:
        unit = "GPU-hours" if self.accelerators else "core-hours"
        rate = (
            f"{ASSUMED_TFLOPS:g} TFLOP/s an accelerator" if self.accelerators else f"{self.gflops:.3g} GFLOP/s a core"
        )
        return (
            f"{what}: {self.runs} runs, {self.flops:.3g} FLOPs, {duration(self.hours * 3600)}, "
            f"{self.machine_hours:.3g} {unit} (at {rate}; encoding and measuring not counted)"
        )


def estimate(study: StudyConfig, graph: Graph | None = None, gflops: float = CORE_GFLOPS) -> Estimate:
    """The cost of a study, including runs that are done already.

    Args:
        study: The study.
        graph: The runs to estimate, such as those of tuning. None: all runs of the study.
        gflops: GFLOP/s of one CPU core, for studies without accelerators.
    """
    graph = graph or plan(study)
    launch, accelerators = study.launch, study.launch.gpus > 0
    workers = launch.nodes * launch.processes if accelerators else 1
    hours, flops = {}, {}
    counted: dict[str, float] = {}
    for run in graph.runs:
        flops[run.name] = run_flops(study, graph, run, counted)
        rate = workers * ASSUMED_TFLOPS * 1e12 if accelerators else gflops * 1e9
        hours[run.name] = flops[run.name] / rate / 3600 + (0.0 if accelerators else OVERHEAD_S / 3600)
    return Estimate(
        runs=len(graph.runs),
        flops=sum(flops.values()),
        machine_hours=sum(hours.values()) * workers,
        hours=_elapsed(graph, hours, launch.max_parallel or len(hours)),
        accelerators=accelerators,
        gflops=gflops,
    )


def _elapsed(graph: Graph, hours: dict[str, float], wide: int) -> float:
    """Hours until all runs are done, `wide` at once, each started in order as soon as those before it are done.

    This is what the scheduler does. The sum of all hours divided by `wide` would be too little: a long chain, such as
    ancestor, stage 1 and stage 2, leaves other workers idle.
    """
    waiting, now = list(graph.runs), 0.0
    running: list[tuple[float, str]] = []
    done: set[str] = set()
    while waiting or running:
        for run in [run for run in waiting if done.issuperset(run.after)][: max(1, wide) - len(running)]:
            waiting.remove(run)
            heapq.heappush(running, (now + hours[run.name], run.name))
        now, name = heapq.heappop(running)
        done.add(name)
    return now


def tuning_estimate(study: StudyConfig, gflops: float = CORE_GFLOPS) -> Estimate | None:
    """The cost of tuning, without extensions of grids; None if nothing is tuned."""
    if not study.tune:
        return None
    graph, tried = trials(study)
    return estimate(study, graph, gflops) if tried else None


def run_flops(study: StudyConfig, graph: Graph, run: StudyRun, counted: dict[str, float]) -> float:
    """FLOPs of one run: of stage 1 by its method's count, otherwise those of a dense model. A run that continues a
    shorter one counts only its additional steps."""
    if run.module in (settings.MODULES["encode"], settings.COPY_MODULE):
        return 0.0
    steps = run.steps - (graph[run.grows].steps if run.grows else 0)
    if run.module == settings.MODULES["condense"]:
        # counting builds the model on the meta device; runs that differ only in their seed share the result
        key = run.config.model_dump_json(include={"arch", "method", "loss", "batch"}) + str(bool(run.config.ancestor))
        if key not in counted:
            counted[key] = settings.stage_1_flops(run.config) or 0.0
        return steps * run.config.batch * counted[key]
    base = run.config.arch or validate(Arch, study.stages["train"]["arch"], "stages.train.arch")
    return sum(steps * run.config.batch * settings.step_flops(base.with_depth(depth)) for depth in run.depths)


def measuring_hours(study: StudyConfig, gflops: float = CORE_GFLOPS) -> float:
    """Estimated hours for measuring the models: their samples and their held-out loss.

    The held-out loss counts as 10,000 forward passes.
    """
    arch = validate(Arch, study.stages["train"]["arch"], "stages.train.arch")
    # A step is a forward pass and a backward pass of twice its cost.
    forward = settings.step_flops(arch) / 3
    models = sum(max(1, len(e.train)) + 1 for e in study.rows) * len(study.depths) * len(study.seeds)
    passes = 10_000 + (study.samples * study.sampler.steps if study.features else 0)
    wide = max(1, study.launch.max_parallel or 1)
    rate = ASSUMED_TFLOPS * 1e12 if study.launch.gpus else gflops * 1e9 * wide
    return models * passes * forward / rate / 3600


def measured_gflops(arch: Arch, batch: int, seconds: float = 1.5) -> float:
    """GFLOP/s of one core of this machine on forward and backward passes of two blocks of `arch`.

    The rate depends on the width and the number of tokens, so the study's own shape is measured: at width 64 a core
    does two thirds of what it does at width 128.
    """
    arch = arch.with_depth(2)
    # One step of a wide model with a large batch takes minutes of a core, and the rate hardly depends on the batch.
    batch = max(1, min(batch, int(2e10 / settings.step_flops(arch))))
    model, threads = DiT(arch), torch.get_num_threads()
    z = torch.randn(batch, *arch.latent_shape)
    t, y = torch.full((batch,), 500), torch.zeros(batch, dtype=torch.long)
    torch.set_num_threads(1)
    try:
        model(z, t, y).square().mean().backward()  # the first call allocates memory
        # CPU time and not wall time, so that the load of a shared machine does not count.
        steps, begun = 0, time.process_time()
        while time.process_time() - begun < seconds:
            model(z, t, y).square().mean().backward()
            steps += 1
        return steps * batch * settings.step_flops(arch) / (time.process_time() - begun) / 1e9
    finally:
        torch.set_num_threads(threads)
