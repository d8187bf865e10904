"""What the speed benchmark measures where, which bars hold there, and rows that several of its parts have."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import limit
from benchmarks.rows import BenchmarkRow, median
from benchmarks.steps import Bench, StepKind
from fine_dist.model.arch import Arch

if TYPE_CHECKING:
    import torch

ORIGINAL_BARS = {"fp32": 1.15, "bf16": 1.25}
"""The original-style step over our dense step; `COMPILED_BAR` for our compiled one."""
COMPILED_BAR = 1.30
STAGE_1_BARS = {16: 1.10, 64: 1.05}
"""Stage-1 step over the dense step, by batch, on a CPU at DiT-S/2."""
STAGE_1_BAR_GPU = 1.06
MFU_BARS_GPU = {32: 33.0, 128: 40.0}
"""Percent of a GPU's stated peak that the compiled dense step of DiT-XL/2 reaches in bf16, by batch; the goal is 50."""
DENSE = StepKind("dense")
COMPILED = "dense, compiled"


@dataclass(frozen=True)
class SpeedPlan:
    """What is measured. seconds: for one group of steps, of which each is taken twice at least."""

    arch: Arch
    batch: int
    device: torch.device
    quick: bool
    own_size: bool
    """Whether the user chose the size: the bars of the CPU's are not its."""
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.arch.name}, batch {self.batch}"

    @property
    def cpu_bars(self) -> bool:
        return self.device.type == "cpu" and not self.quick and not self.own_size

    @property
    def gpu_bars(self) -> bool:
        return self.device.type == "cuda" and not self.quick

    def bench(self) -> Bench:
        return Bench(self.arch, self.device, rounds=2 if self.quick else 20 if self.device.type == "cuda" else 5)


def precisions(device: torch.device) -> list[str]:
    """fp32, and bf16 where the device has products of its own in it: emulated ones say nothing of a step."""
    from fine_dist.engine.accelerators import emulates_bf16

    return ["fp32"] if emulates_bf16(device) else ["fp32", "bf16"]


def kinds(arch: Arch) -> dict[str, StepKind]:
    """Every kind of step of ours, by name."""
    sigma = [StepKind(at(divisor), arch.hidden_size // divisor, joint=False) for divisor in limit.SIGMA_AIMS]
    return {kind.name: kind for kind in (DENSE, StepKind("stage 1", arch.hidden_size), *sigma)}


def at(divisor: int) -> str:
    return f"sigma-only, r = D/{divisor}" if divisor > 1 else "sigma-only, r = D"


# --- rows -----------------------------------------------------------------------------------------------------------


def mfu_rows(plan: SpeedPlan, precision: str, name: str, seconds: list[float], flops: float) -> list[BenchmarkRow]:
    """Of a GPU whose peak is known: the share of it that the step's arithmetic takes."""
    from fine_dist.engine.accelerators import peak_flops

    peak = peak_flops(plan.device, precision, None) if plan.device.type == "cuda" else None
    if peak is None:
        return []
    aimed = plan.gpu_bars and name == COMPILED and precision == "bf16" and plan.arch.name.startswith("DiT-XL/2")
    share = 100 * flops / median(seconds) / peak
    bar = MFU_BARS_GPU.get(plan.batch) if aimed else None
    return [BenchmarkRow(f"{name}, {precision}: MFU, {plan.label}", share, "%", bar)]


def reference_row(plan: SpeedPlan, name: str, precision: str, value: float, ours: str = "ours") -> BenchmarkRow:
    """How many times as long a reference's step takes as ours."""
    words = {"original": "original-style DiT", "diffusers": "diffusers' DiTTransformer2DModel"}[name]
    bars = {"ours": ORIGINAL_BARS[precision], "ours, compiled": COMPILED_BAR}
    bar = bars.get(ours) if plan.cpu_bars and name == "original" else None
    return BenchmarkRow(f"{words} / {ours}, {precision}, {plan.label} (above 1: ours is faster)", value, "x", bar)


def stage_1_row(plan: SpeedPlan, precision: str, value: float, least: float) -> BenchmarkRow:
    """Stage 1 over dense. least: its multiply-adds over the dense step's, which no speed goes below."""
    bar = STAGE_1_BAR_GPU if plan.gpu_bars else STAGE_1_BARS.get(plan.batch) if plan.cpu_bars else None
    label = f"stage 1, {precision}: / dense, {plan.label} (limit by multiply-adds {least:.3f})"
    return BenchmarkRow(label, value, "x", bar, "lower")


def release(device: torch.device) -> None:
    """Let go of what is no longer held, before the next part makes its models."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
