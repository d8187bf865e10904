"""What the engine's loop adds to its steps: a real run that streams shards, writes a checkpoint and logs, timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import BenchmarkRow, median
from benchmarks.steps import Bench, StepKind
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.model.arch import Arch

if TYPE_CHECKING:
    import torch


class LoopClock:
    """Seconds spent in forward, backward and optimizer so far, and for each step's start: the time, that sum, and
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


def loop(arch: Arch, device: torch.device, batch: int, steps: int, bars: bool) -> list[BenchmarkRow]:
    """A real run on streamed shards: what is not forward, backward or optimizer, waiting for data, and saving."""
    from fine_dist.data.stream import LatentStream
    from fine_dist.diffusion.objective import Objective
    from fine_dist.engine.loop import Run
    from fine_dist.engine.program import Program
    from fine_dist.engine.run_dir import RunDir
    from fine_dist.engine.stopping import Stopper
    from fine_dist.engine.world import World
    from fine_dist.model.flops import train_flops

    clock = LoopClock(device)

    class TimedRun(Run):
        def next_batch(self, batches: Any) -> tuple[Any, float]:
            clock.starts.append((time.perf_counter(), clock.inside, self.checkpoints.writing))
            batch, waited_s = super().next_batch(batches)
            clock.waited += waited_s
            return batch, waited_s

    save_at = steps // 2
    settings = EngineConfig(checkpoint_every=save_at, log_every=5, eval_every=10**6, preview_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        shards = made_up_shards(Path(folder) / "shards", arch, count=batch * 8)
        stream = LatentStream(DataConfig(shards=str(shards), streams=4), seed=0, global_batch=batch, expect=arch)
        model = Bench(arch, device, 1).model(StepKind("dense"))
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


def loop_rows(clock: LoopClock, run: Any, save_at: int, label: str, bars: bool) -> list[BenchmarkRow]:
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
        BenchmarkRow(
            f"loop beside forward, backward, optimiser, {label}", 100 * overhead, "%", 3.0 if bars else None, "lower"
        ),
        BenchmarkRow(
            f"loop waiting for data, {label}", 100 * clock.waited / sum(lasted), "%", 2.0 if bars else None, "lower"
        ),
        BenchmarkRow("copying the state for a checkpoint", copying, "s", None, "lower"),
        BenchmarkRow(f"stall of a save beyond copying, {label}", stall, "steps", 1.0 if bars else None, "lower"),
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
