"""`python -m benchmarks speed`: a training step of every kind against what this machine could do.

Steps are timed in one process, in turn, on the same batch: a dense DiT, stage 1 of shared factors and the stage that
trains sigma alone; beside them the machine's own matrix products (`limit`), a DiT in plain modules and diffusers'
(`reference_dit`). Then where their time goes (`parts`), memory, and what the loop adds (`speed_loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks import limit
from benchmarks.rows import BenchmarkRow, median
from benchmarks.speed_plan import SpeedPlan, at, kinds, mfu_rows, precisions, reference_row, release, stage_1_row
from benchmarks.steps import Step, ratio
from fine_dist.model.arch import arch as named


def run(quick: bool, arch: str | None = None, batch: int | None = None) -> list[BenchmarkRow]:
    """All rows. quick: two layers, a small batch, two rounds: a smoke test. arch, batch: another size than DiT-S/2's
    at 16 (six layers on a CPU); the loop and larger batches are then left out."""
    import torch
    from tqdm import tqdm

    from fine_dist.engine.allocator import keep_freed_memory
    from fine_dist.engine.dist import pick_device

    device = pick_device("auto")
    if device.type == "cpu":
        keep_freed_memory()  # as the loop does
    torch.set_float32_matmul_precision("high")
    # On a CPU half the depth: layers are alike, and on a shared machine many turns of few say more than two of twelve.
    size = "DiT-S/2-L2" if quick else "DiT-S/2-L6" if device.type == "cpu" else "DiT-S/2"
    shape = named(arch or size, learn_sigma=False, input_size=16 if quick else 32)
    own_size = arch is not None or batch is not None
    seconds = 90.0 if device.type == "cpu" else 3.0
    plan = SpeedPlan(shape, batch or (4 if quick else 16), device, quick, own_size, seconds)
    if precisions(device) == ["fp32"]:
        print("speed: bf16 is left out: this CPU has no products in it (it would need AVX-512)", flush=True)
    rows: list[BenchmarkRow] = []
    with tqdm(pieces(plan).items(), desc="speed", unit="part") as bar:
        for name, measure in bar:
            bar.set_postfix_str(name)
            rows += measure()
            release(device)
    return rows


def pieces(plan: SpeedPlan) -> dict[str, Callable[[], list[BenchmarkRow]]]:
    """What is measured, by what the bar says meanwhile."""
    from benchmarks.isolated_steps import isolated_rows
    from benchmarks.speed_loop import loop
    from benchmarks.speed_modes import compiled_of, memory_of, paths_of

    found: dict[str, Callable[[], list[BenchmarkRow]]] = {}
    for precision in precisions(plan.device):
        found[f"steps, {precision}"] = lambda p=precision: steps_of(plan, p)  # type: ignore[misc]
        if plan.device.type == "cpu":
            found[f"isolated, {precision}"] = lambda p=precision: isolated_rows(plan, p)  # type: ignore[misc]
        if not plan.quick:  # compiling alone takes longer than all else then
            found[f"compiled, {precision}"] = lambda p=precision: compiled_of(plan, p)  # type: ignore[misc]
    if not (plan.quick or plan.own_size):
        found["stage 1, batch 64"] = lambda: stage_1_of(replace(plan, batch=64))
    small = SpeedPlan(plan.arch.with_depth(2), plan.batch, plan.device, plan.quick, True, plan.seconds)
    found["paths"] = lambda: paths_of(small)
    found["memory"] = lambda: memory_of(plan if plan.own_size else small)
    if not plan.own_size:
        found["the loop"] = lambda: loop(small.arch, plan.device, plan.batch, 8 if plan.quick else 14, plan.cpu_bars)
    return found


# --- steps ----------------------------------------------------------------------------------------------------------


def groups(plan: SpeedPlan, precision: str) -> list[dict[str, Callable[[], Step]]]:
    """Makers of the steps that are timed together, each group with the dense step. All are one group on a CPU, where
    turns must lie close; on a GPU each stands beside the dense step alone, so that large models fit."""
    from benchmarks.reference_dit import diffusers_step, original_step

    bench = plan.bench()
    makers: dict[str, Callable[[], Step]] = {
        name: lambda kind=kind: bench.step(kind, plan.batch, precision)  # type: ignore[misc]
        for name, kind in kinds(plan.arch).items()
    }
    makers["original"] = lambda: original_step(plan.arch, plan.batch, precision, plan.device)
    makers["diffusers"] = lambda: diffusers_step(plan.arch, plan.batch, precision, plan.device)
    if plan.device.type == "cpu":
        return [makers]
    return [{name: makers[name] for name in ("dense", other)} for other in makers if other != "dense"]


def steps_of(plan: SpeedPlan, precision: str) -> list[BenchmarkRow]:
    """All steps of a precision against the dense one, the references and the machine, and their parts."""
    from benchmarks.step_profile import part_rows, profile

    square = limit.square_rate(precision, plan.device)
    own = limit.own_rate(plan.arch, plan.batch, precision, plan.device)
    rows: list[BenchmarkRow] = []
    shown: dict[str, list[BenchmarkRow]] = {}
    for makers in groups(plan, precision):
        steps = {name: make() for name, make in makers.items()}
        figures = plan.bench().times({**steps, "square": square, "own": own}, plan.seconds)
        for name, step in steps.items():
            if name in shown:
                continue
            if name in ("original", "diffusers"):
                shown[name] = [reference_row(plan, name, precision, ratio(figures, name, "dense"))]
                continue
            shown[name] = step_rows(plan, precision, name, steps, figures)
            if name in ("dense", "stage 1", at(1)):
                shown[name] += part_rows(f"{name}, {precision}", [profile(step)])
        rows = rows or [
            BenchmarkRow(f"matrix products, {precision}: the best square", median(figures["square"]) / 1e9, "GFLOP/s"),
            BenchmarkRow(
                f"matrix products, {precision}: the model's own shapes", median(figures["own"]) / 1e9, "GFLOP/s"
            ),
        ]
        del steps
        release(plan.device)
    return [*rows, *(row for some in shown.values() for row in some)]


def step_rows(plan: SpeedPlan, precision: str, name: str, steps: dict[str, Step], figures: Any) -> list[BenchmarkRow]:
    """A step of ours: its speed, against the dense one, and its share of the machine's products."""
    where, seconds, flops = f"{name}, {precision}", figures[name], steps[name].flops
    rows = [
        BenchmarkRow(f"{where}: step, {plan.label}", median(seconds), "s", None, "lower"),
        BenchmarkRow(f"{where}: images/s", plan.batch / median(seconds), "1/s"),
        BenchmarkRow(f"{where}: share of the best square product", limit.share(figures["square"], seconds, flops), "%"),
        BenchmarkRow(f"{where}: share of its own products' rate", limit.share(figures["own"], seconds, flops), "%"),
        *mfu_rows(plan, precision, name, seconds, flops),
    ]
    least = flops / steps["dense"].flops
    if name == "stage 1":
        rows.append(stage_1_row(plan, precision, ratio(figures, name, "dense"), least))
    elif name != "dense":
        divisor = plan.arch.hidden_size // kinds(plan.arch)[name].rank  # type: ignore[operator]
        bar = limit.sigma_bar(divisor, least) if plan.cpu_bars else None
        over = ratio(figures, name, "dense")
        rows.append(BenchmarkRow(f"{where}: / dense (limit by multiply-adds {least:.3f})", over, "x", bar, "lower"))
    return rows


def stage_1_of(plan: SpeedPlan) -> list[BenchmarkRow]:
    """Joint training of shared factors against the dense step, alone."""
    bench, kind = plan.bench(), kinds(plan.arch)
    steps = {name: bench.step(kind[name], plan.batch) for name in ("dense", "stage 1")}
    figures = bench.times(steps, plan.seconds)  # type: ignore[arg-type]
    return [
        stage_1_row(plan, "fp32", ratio(figures, "stage 1", "dense"), steps["stage 1"].flops / steps["dense"].flops)
    ]
