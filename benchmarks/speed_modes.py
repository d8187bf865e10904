"""Steps in other modes: compiled, on each compute path of the factors, with blocks recomputed; and their memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import limit
from benchmarks.peak_memory import peak_memory_of
from benchmarks.rows import BenchmarkRow, median, say
from benchmarks.speed_plan import (
    COMPILED,
    DENSE,
    MFU_BARS_GPU,
    SpeedPlan,
    at,
    kinds,
    mfu_rows,
    precisions,
    reference_row,
    release,
)
from benchmarks.steps import Step, StepKind, compiles, ratio

AUTO_SLACK = 1.03
"""The automatic choice never loses to either path: equal up to what the clock can tell."""
PATHS = ("factored", "composed")


def compiled_of(plan: SpeedPlan, precision: str) -> list[BenchmarkRow]:
    """The original-style step, as it is and with compiled blocks, over ours with `engine.compile`; no row where either
    does not compile."""
    from benchmarks.reference_dit import original_step

    bench = plan.bench()
    ours = bench.step(DENSE, plan.batch, precision, compiled=True)
    theirs = original_step(plan.arch, plan.batch, precision, plan.device, compiled=True)
    for whose, step in {"our": ours, "the original-style": theirs}.items():
        if why := compiles(step):
            say(f"no rows of compiled steps in {precision}, because {whose} step does not compile: {why}")
            return []
    ours.ready = theirs.ready = None  # another shape would be compiled anew
    steps = {
        "compiled": ours,
        "original": original_step(plan.arch, plan.batch, precision, plan.device),
        "original compiled": theirs,
    }
    figures = bench.times(steps, plan.seconds)  # type: ignore[arg-type]
    both = ratio(figures, "original compiled", "compiled")
    return [
        reference_row(plan, "original", precision, ratio(figures, "original", "compiled"), "ours, compiled"),
        reference_row(plan, "original", precision, both, "ours, both compiled"),
        *compiled_rows(plan, precision, figures["compiled"], ours.flops),
        *([] if plan.device.type == "cpu" or precision == "fp32" else large_batch(plan, precision)),
    ]


def compiled_rows(plan: SpeedPlan, precision: str, seconds: list[float], flops: float) -> list[BenchmarkRow]:
    """Our compiled step's speed, and on a known GPU its MFU."""
    speed = BenchmarkRow(f"{COMPILED}, {precision}: images/s, {plan.label}", plan.batch / median(seconds), "1/s")
    return [speed, *mfu_rows(plan, precision, COMPILED, seconds, flops)]


def large_batch(plan: SpeedPlan, precision: str) -> list[BenchmarkRow]:
    """Our compiled step at the largest batch that has a bar; no row where the card has too little memory for it."""
    plan = replace(plan, batch=max(MFU_BARS_GPU))
    try:
        step = plan.bench().step(DENSE, plan.batch, precision, compiled=True)
        step.ready = None  # another shape would be compiled anew
        return compiled_rows(plan, precision, plan.bench().times({COMPILED: step}, plan.seconds)[COMPILED], step.flops)
    except torch.OutOfMemoryError:
        say(f"no row of batch {plan.batch}: the card's memory is too small")
        return []
    finally:
        release(plan.device)


def paths_of(plan: SpeedPlan) -> list[BenchmarkRow]:
    """Sigma-only steps on each path: what choosing by multiply-adds is worth."""
    bench, rows = plan.bench(), []
    for divisor in limit.SIGMA_AIMS:
        rank = plan.arch.hidden_size // divisor
        steps = {
            path: bench.step(StepKind(path, rank, joint=False, path=path), plan.batch) for path in ("auto", *PATHS)
        }
        figures = bench.times(steps, plan.seconds / 4)  # type: ignore[arg-type]
        better = min(PATHS, key=lambda path: ratio(figures, path, "auto"))
        bar = None if plan.quick else AUTO_SLACK
        label = f"{at(divisor)}, {plan.label}, fp32: auto / the better path ({better})"
        rows.append(BenchmarkRow(label, ratio(figures, "auto", better), "x", bar, "lower"))
        release(plan.device)
    return rows


def memory_of(plan: SpeedPlan) -> list[BenchmarkRow]:
    """Peak memory of a step of each kind and precision, and what recomputing blocks saves of it and takes in time."""
    bench, rows = plan.bench(), []
    for precision in precisions(plan.device):
        for name, kind in kinds(plan.arch).items():
            if name not in ("dense", "stage 1", at(1)):
                continue
            steps: dict[str, Callable[[], float]] = {}
            memory = {}
            for recompute in ("none", "blocks"):
                step: Step = bench.step(kind, plan.batch, precision, recompute)
                memory[recompute] = peak_memory_of(step, plan.device) / 2**20
                steps[recompute] = step
            figures = bench.times(steps, plan.seconds / 8)
            where = f"{name}, {precision}, {plan.label}"
            saved = memory["blocks"] / memory["none"] if memory["none"] else 0.0
            rows += [
                BenchmarkRow(f"{where}: peak memory of a step", memory["none"], "MiB", None, "lower"),
                BenchmarkRow(f"{where}: checkpointing, memory", saved, "x", None, "lower"),
                BenchmarkRow(f"{where}: checkpointing, time", ratio(figures, "blocks", "none"), "x", None, "lower"),
            ]
            del steps, step
            release(plan.device)
    return rows
