"""`python -m fine_dist.benchmark speed`: a training step of every kind, and what the loop adds to it.

Steps are timed in one process, in turn, on the same batch: dense DiT, stage 1 of shared factors and the stage that
trains sigma alone with each compute path; fp32 and bf16, with and without activation checkpointing. The loop is timed
on a real run that streams shards, writes checkpoints and logs.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.benchmarks.rows import Row, interleaved, median, median_of_ratios
from fine_dist.config import DataConfig, DiffusionConfig, EngineConfig, OptimConfig
from fine_dist.model.zoo import Arch
from fine_dist.model.zoo import arch as named

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SIGMA_BARS = {1: 0.93, 2: 0.65, 4: 0.45}
"""Sigma-only step over the dense step, for rank D / key (the arithmetic's limit at r = D is about 0.87)."""
STAGE_1_BARS = {16: 1.20, 64: 1.08}
"""Stage-1 step over the dense step, by batch."""
AUTO_SLACK = 1.03
"""The automatic choice never loses to either path: equal up to what the clock can tell."""


def run(quick: bool) -> list[Row]:
    """All measurements. quick: two layers, a small batch, two rounds; its ratios are a smoke test."""
    import torch
    from tqdm import tqdm

    from fine_dist.engine.dist import pick_device
    from fine_dist.model.flops import peak_flops

    device = pick_device("auto")
    torch.set_float32_matmul_precision("high")
    arch = named("DiT-S/2-L2", learn_sigma=False, input_size=16) if quick else named("DiT-S/2", learn_sigma=False)
    bench = Bench(arch, device, rounds=2 if quick else 5)
    batches = (4,) if quick else (16, 64)
    peaks = {p: peak_flops(device, p, None) for p in ("fp32", "bf16")}
    parts: dict[str, Callable[[], list[Row]]] = {
        **{f"stage 1, batch {b}": lambda b=b: stage_1(bench, b, quick) for b in batches},  # type: ignore[misc]
        "sigma only": lambda: sigma_only(bench, batches[0], quick),
        "precision and memory": lambda: modes(bench, batches[0], peaks),
        "the loop": lambda: loop(arch, device, batches[0], steps=8 if quick else 14, bars=not quick),
    }
    rows: list[Row] = []
    with tqdm(parts.items(), desc="speed", unit="part") as bar:
        for name, measure in bar:
            bar.set_postfix_str(name)
            rows += measure()
            gc.collect()
    return rows


@dataclass(frozen=True)
class Kind:
    """What is trained: dense, or factors of a rank with all (`joint`) or only sigma training, through a path."""

    name: str
    rank: int | None = None
    joint: bool = True
    path: str = "auto"


class Bench:
    """Makes training steps of one architecture on one device."""

    def __init__(self, arch: Arch, device: torch.device, rounds: int) -> None:
        self.arch, self.device, self.rounds = arch, device, rounds

    def model(self, kind: Kind) -> nn.Module:
        import torch

        from fine_dist.model.dit import DiT
        from fine_dist.model.factors import FactoredDiT
        from fine_dist.model.roles import train_only

        generator = torch.Generator().manual_seed(0)
        if kind.rank is None:
            return DiT(self.arch, generator=generator).to(self.device)
        model = FactoredDiT(self.arch, kind.rank, generator, kind.path)  # type: ignore[arg-type]
        if not kind.joint:
            train_only(model, "scaler")
        return model.to(self.device)

    def step(self, kind: Kind, batch: int, precision: str = "fp32", recompute: str = "none") -> Callable[[], float]:
        """A function that takes one training step, as the loop does, and gives its seconds."""
        import torch

        from fine_dist.diffusion.objective import Objective
        from fine_dist.engine import backend as backends
        from fine_dist.engine.dist import World

        model = self.model(kind)
        model.recompute = recompute  # type: ignore[assignment]
        backend = backends.PlainBackend(model, OptimConfig(), World(device=self.device))
        objective = Objective(DiffusionConfig(), self.arch, seed=0)
        engine = EngineConfig(precision=precision)
        data = made_up_batch(self.arch, batch, self.device)

        def once() -> float:
            begun = time.perf_counter()
            with backends.precision(engine, self.device):
                losses = objective(backend.model, data)
            backend.backward(losses, global_batch=batch, last=True)
            backend.step(1e-4)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        return once

    def times(self, steps: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        return interleaved(steps, self.rounds)


@dataclass(frozen=True)
class MadeUp:
    """A batch of noise."""

    step: int
    latents: Tensor
    labels: Tensor
    positions: Tensor


def made_up_batch(arch: Arch, batch: int, device: torch.device) -> MadeUp:
    import torch

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *arch.latent_shape, generator=generator)
    labels = torch.randint(0, arch.num_classes, (batch,), generator=generator)
    return MadeUp(0, latents.to(device), labels.to(device), torch.arange(batch))


def stage_1(bench: Bench, batch: int, quick: bool) -> list[Row]:
    """Joint training of shared factors against the dense step."""
    width = bench.arch.hidden_size
    times = bench.times(
        {
            "dense": bench.step(Kind("dense"), batch),
            "joint": bench.step(Kind("joint", width), batch),
        }
    )
    bar = None if quick else STAGE_1_BARS[batch]
    label = f"{bench.arch.name}, batch {batch}, fp32"
    return [
        Row(f"dense step, {label}", median(times["dense"]), "s", None, "lower"),
        Row(f"stage-1 step / dense step, {label}", ratio(times, "joint", "dense"), "x", bar, "lower"),
    ]


def sigma_only(bench: Bench, batch: int, quick: bool) -> list[Row]:
    """Sigma-only steps at three ranks and three choices of path against the dense step."""
    label = f"{bench.arch.name}, batch {batch}, fp32"
    rows = []
    for divisor, bar in SIGMA_BARS.items():
        rank = bench.arch.hidden_size // divisor
        steps = {"dense": bench.step(Kind("dense"), batch)}
        for path in ("auto", "factored", "composed"):
            steps[path] = bench.step(Kind(path, rank, joint=False, path=path), batch)
        times = bench.times(steps)
        at = f"r = D/{divisor}" if divisor > 1 else "r = D"
        rows.append(
            Row(
                f"sigma-only / dense, {at}, {label}",
                ratio(times, "auto", "dense"),
                "x",
                None if quick else bar,
                "lower",
            )
        )
        for path in ("factored", "composed"):
            rows.append(Row(f"  {path} / dense, {at}", ratio(times, path, "dense"), "x", None, "lower"))
        best = min(("factored", "composed"), key=lambda path: ratio(times, path, "dense"))
        rows.append(
            Row(
                f"  auto / the better path ({best}), {at}",
                ratio(times, "auto", best),
                "x",
                None if quick else AUTO_SLACK,
                "lower",
            )
        )
        gc.collect()
    return rows


def modes(bench: Bench, batch: int, peaks: dict[str, float | None]) -> list[Row]:
    """Every kind of step with each precision, activation checkpointing on and off: speed, MFU, peak memory."""
    from fine_dist.engine.monitor import mfu
    from fine_dist.model.flops import train_flops

    width = bench.arch.hidden_size
    kinds = [
        Kind("dense"),
        Kind("stage 1", width),
        Kind("sigma-only, factored", width, joint=False, path="factored"),
        Kind("sigma-only, composed", width, joint=False, path="composed"),
    ]
    rows = []
    for precision in ("fp32", "bf16"):
        for recompute in ("none", "blocks"):
            steps, memory = {}, {}
            for kind in kinds:
                step = bench.step(kind, batch, precision, recompute)
                memory[kind.name] = peak_memory_of(step, bench.device)
                steps[kind.name] = step
            times = interleaved(steps, max(2, bench.rounds // 2), warmup=0)
            for kind in kinds:
                seconds = median(times[kind.name])
                where = f"{kind.name}, {precision}" + (", checkpointing" if recompute != "none" else "")
                used = mfu(batch / seconds, train_flops(bench.arch), peaks[precision], 1)
                rows.append(Row(f"{where}: images/s", batch / seconds, "1/s"))
                rows.append(Row(f"{where}: over dense", ratio(times, kind.name, "dense"), "x", None, "lower"))
                if used is not None:
                    rows.append(Row(f"{where}: MFU", 100 * used, "%"))
                rows.append(Row(f"{where}: peak memory of a step", memory[kind.name] / 2**20, "MiB", None, "lower"))
            del steps
            gc.collect()
    return rows


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return median_of_ratios(times[over], times[under])


def peak_memory_of(step: Callable[[], float], device: torch.device) -> float:
    """Bytes that a step (its second: the optimiser has its state) takes beyond what lay there before it."""
    import torch

    step()
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    return resident_growth(step)


def resident_growth(body: Callable[[], object]) -> float:
    """Bytes by which this process's resident set grew at most during a call (Linux; 0 where it cannot be told)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        body()
        return 0.0
    release_free_memory()
    reset.write_text("5")  # the peak starts again from what is resident now
    before = _kib(status, "VmRSS")
    body()
    return (_kib(status, "VmHWM") - before) * 1024.0


def release_free_memory() -> None:
    """Give freed memory back to the system (glibc), so that what a step takes is seen to grow."""
    import ctypes

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kib(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1])


# --- the loop -------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent in forward, backward and optimiser so far, and for each step's start: the time, that sum, and
    whether a checkpoint was being written."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inside = self.waited = 0.0
        self.starts: list[tuple[float, float, bool]] = []

    def timed(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """`body`, its seconds counted."""
        import torch

        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = body(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.inside += time.perf_counter() - begun
            return result

        return call


def loop(arch: Arch, device: torch.device, batch: int, steps: int, bars: bool) -> list[Row]:
    """A real run on streamed shards: what is not forward, backward or optimiser, waiting for data, and saving."""
    from fine_dist.data.stream import LatentStream
    from fine_dist.diffusion.objective import Objective
    from fine_dist.engine.dist import World
    from fine_dist.engine.loop import Run
    from fine_dist.engine.program import Program
    from fine_dist.engine.run_dir import RunDir
    from fine_dist.engine.stopping import Stopper
    from fine_dist.model.flops import train_flops

    clock = Clock(device)

    class TimedRun(Run):
        def next_batch(self, batches: Any) -> tuple[Any, float]:
            clock.starts.append((time.perf_counter(), clock.inside, self.checkpoints.writing))
            batch, waited_s = super().next_batch(batches)
            clock.waited += waited_s
            return batch, waited_s

    save_at = steps // 2
    settings = EngineConfig(checkpoint_every=save_at, log_every=5, eval_every=10**6, picture_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        shards = made_up_shards(Path(folder) / "shards", arch, count=batch * 8)
        stream = LatentStream(DataConfig(shards=str(shards), streams=4), seed=0, global_batch=batch, expect=arch)
        model = Bench(arch, device, 1).model(Kind("dense"))
        model.forward = clock.timed(model.forward)
        program = Program(
            model,
            Objective(DiffusionConfig(), arch, seed=0),
            stream,
            flops_per_sample=train_flops(arch),
            tokens_per_sample=arch.num_tokens,
        )
        with RunDir(Path(folder) / "run").open("benchmark", {}) as run_dir, Stopper(run_dir, None, True) as stopper:
            run = TimedRun(
                program, steps, batch, OptimConfig(), settings, run_dir, 0, "loop", World(device=device), stopper
            )
            run.backend.backward = clock.timed(run.backend.backward)  # type: ignore[method-assign]
            run.backend.step = clock.timed(run.backend.step)  # type: ignore[method-assign]
            run.train()
            run.monitor.close()
            stream.close()
            return loop_rows(clock, run, save_at, f"{arch.name}, batch {batch}", bars)


def loop_rows(clock: Clock, run: Any, save_at: int, label: str, bars: bool) -> list[Row]:
    """From the times of steps: step i lasts from start i to start i + 1; step `save_at - 1` ends with the saving."""
    lasted = [after[0] - before[0] for before, after in zip(clock.starts, clock.starts[1:])]
    inside = [after[1] - before[1] for before, after in zip(clock.starts, clock.starts[1:])]
    disturbed = [i for i in range(len(lasted)) if i == save_at - 1 or clock.starts[i][2]]
    ordinary = [i for i in range(1, len(lasted)) if i not in disturbed]  # the first warms up
    usual = median([lasted[i] for i in ordinary])
    overhead = median([(lasted[i] - inside[i]) / lasted[i] for i in ordinary])
    copying = copy_seconds(run)
    # What the run lost: the call of the save itself, and what its writing took from the steps beside it.
    lost = sum(lasted[i] - usual for i in disturbed)
    stall = max(0.0, lost - copying) / usual
    return [
        Row(f"loop beside forward, backward, optimiser, {label}", 100 * overhead, "%", 3.0 if bars else None, "lower"),
        Row(f"loop waiting for data, {label}", 100 * clock.waited / sum(lasted), "%", 2.0 if bars else None, "lower"),
        Row("copying the state for a checkpoint", copying, "s", None, "lower"),
        Row(f"stall of a save beyond copying, {label}", stall, "steps", 1.0 if bars else None, "lower"),
    ]


def copy_seconds(run: Any) -> float:
    """Seconds to copy what a checkpoint holds into fresh host memory."""
    begun = time.perf_counter()
    copies = []
    for piece in run.backend.pieces():
        parts = [piece.weight, run.ema.values[piece.name], *run.backend.moments(piece).values()]
        copies += [part.to("cpu", copy=True) for part in parts]
    return time.perf_counter() - begun


def made_up_shards(folder: Path, arch: Arch, count: int) -> Path:
    """Four shards of noise in the shape of the architecture's latents."""
    import numpy as np

    from fine_dist.data.shards import write_shards

    generator = np.random.default_rng(0)
    latents = generator.standard_normal((count, *arch.latent_shape), dtype=np.float32)
    labels = generator.integers(0, arch.num_classes, count)
    write_shards(folder, latents, labels, num_classes=arch.num_classes, shard_samples=-(-count // 4))
    return folder
