"""The time of a step by operation, grouped by purpose, from torch's profiler.

An operation is told by its own name, by what it runs inside (a step's ranges, autograd's nodes, functions with a
backward pass of their own) and, where it is plain arithmetic, by its shape: [B, T, D] is modulation and residual,
[B, T, 4D] is around GELU. On a CPU the time is the thread's that starts the operation; on a GPU the kernels'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.rows import BenchmarkRow
from benchmarks.steps import RANGE, Step

PARTS = ("GEMM", "attention", "norm and modulation", "GELU", "casts and copies", "optimiser", "EMA", "loss", "the rest")
"""In the order in which they are shown; `the rest` is what no pattern tells, and what the device waited."""
WHOLE = ("optimiser", "EMA", "loss", "the rest")
"""Parts that are not told apart by direction."""

_GEMM = re.compile(r"::(_?(add)?(mm|bmm|baddbmm|mv)|_addmm_activation|linear|\w*linear\w*|einsum|\w*convolution\w*)$")
_ATTENTION = re.compile(r"attention|scaled_?dot_?product", re.IGNORECASE)
_GELU = re.compile(r"gelu", re.IGNORECASE)
_NORM = re.compile(r"layer_?norm|modulat|gated_?add", re.IGNORECASE)
_COPY = re.compile(r"::(copy_|_to_copy|to|clone|contiguous|empty\w*)$")
_BACKWARD = "autograd::engine::evaluate_function"
_SCALED = re.compile(r"factored|accumulategrad", re.IGNORECASE)
"""Arithmetic that is neither modulation nor GELU whatever its shape: sigma's, and sums of gradients."""


def profile(step: Step) -> dict[tuple[str, str], float]:
    """Milliseconds of one step by (part, direction), the direction of `WHOLE` parts being empty. Sums to the step.

    The step should have been taken before, so that nothing is set up in it.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as seen:
        wall_s = step()
    found: dict[tuple[str, str], float] = {}
    for event in seen.events():
        if (spent := spent_us(event, step.device)) > 0:
            place = classify(event, step.width)
            found[place] = found.get(place, 0.0) + spent / 1e3
    told = sum(ms for (part, _), ms in found.items() if part != "the rest")
    found[("the rest", "")] = max(0.0, 1e3 * wall_s - told)
    return found


def spent_us(event: Any, device: torch.device) -> float:
    """Microseconds of the event itself, without what runs inside it."""
    if event.device_type != torch.autograd.DeviceType.CPU:
        return 0.0  # a kernel; the operation that started it says its time
    return float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total)


def classify(event: Any, width: int) -> tuple[str, str]:
    """(part, direction) of an event. width: D."""
    names = [one.name for one in lineage(event)]
    inside = next((name.removeprefix(RANGE) for name in names if name.startswith(RANGE)), "")
    backward = inside == "backward" or any(name.startswith(_BACKWARD) for name in names)
    direction = "backward" if backward else "forward"
    if inside in ("optimiser", "EMA"):
        return inside, ""
    if inside == "forward" and not backward:  # the objective, without the model that it asks
        return "loss", ""
    part = part_of(names, event.input_shapes or [], width)
    return (part, "") if part in WHOLE else (part, direction)


def part_of(names: list[str], shapes: list[Any], width: int) -> str:
    """What an operation of the model is for. names: its own, then of all that it runs inside, innermost first."""
    if any(_ATTENTION.search(name) for name in names):
        return "attention"
    if _GEMM.search(names[0]):
        return "GEMM"
    if any(_GELU.search(name) for name in names):
        return "GELU"
    if any(_NORM.search(name) for name in names):
        return "norm and modulation"
    if _COPY.search(names[0]):
        return "casts and copies"
    if any(_SCALED.search(name) for name in names) or not names[0].startswith("aten::"):
        return "the rest"
    sides = [shape[-1] for shape in shapes if len(shape) == 3]
    if width and 4 * width in sides:
        return "GELU"
    return "norm and modulation" if width and width in sides else "the rest"


def lineage(event: Any) -> Iterator[Any]:
    """The event and all that it runs inside, innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent


def part_rows(name: str, runs: Iterable[dict[tuple[str, str], float]]) -> list[BenchmarkRow]:
    """The parts of a step, from one or several profiles of it: milliseconds and percent, and the room that is left.

    The room is all that is neither a matrix product nor attention: no change of it could win more.
    """
    runs = list(runs)
    total = sum(ms for run in runs for ms in run.values())
    rows, kept = [], 0.0
    for part in PARTS:
        for direction in ("",) if part in WHOLE else ("forward", "backward"):
            ms = sum(run.get((part, direction), 0.0) for run in runs)
            kept += ms if part in ("GEMM", "attention") else 0.0
            label = f"  {name}: {part}" + (f", {direction}" if direction else "")
            rows.append(BenchmarkRow(label, ms / len(runs), "ms", None, "lower", 100 * ms / total))
    return [
        *rows,
        BenchmarkRow(f"  {name}: room, all but GEMM and attention", 100 * (1 - kept / total), "%", None, "lower"),
    ]
