"""Timings for `benchmarks scale` and `plan --gloo` in real processes: collectives, shared cores, the engine's step.

All ranks call every function here (`fine_dist.testing.run_distributed`); the results are plain values.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as td

from fine_dist.data.stream import Batch
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.backend import Backend
from fine_dist.engine.loop import Run
from fine_dist.engine.program import Program
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.world import World
from fine_dist.methods import CONDENSES, build
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.planning.scaling_model import HOPS, SIZE, Collective, Link, counts

SMALL, LARGE, BURST = 1 << 8, 1 << 20, 16
"""Values in the two messages that measure a link, and the number of small messages in a row."""
WARMUP = 3
"""Warm-up steps of a run, which are not counted."""
NEVER = 10**9
"""Interval in steps of what a timed run does not do."""


def measure(arch: str, micro: int, steps: int, kinds: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Time the links, a computation on shared cores, and a short run of the engine for each (model, ZeRO stage).

    Returns `links` {collective: [bytes/s, s]}, `kernel_s`, and `runs` {"model stage": medians of `Clock`'s parts}.
    """
    cores = sorted(os.sched_getaffinity(0))
    # Each process is bound to a core, as schedulers do. Otherwise Linux tends to
    # move processes that communicate onto one core.
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", 0)) % len(cores)]})
    world = dist.world("cpu")
    times: dict[str, Any] = {"kernel_s": kernel_s(world), "links": links(world), "runs": {}}
    for model, stage in kinds:
        times["runs"][f"{model} {stage}"] = time_run(world, Arch.model_validate_json(arch), model, stage, micro, steps)
    return times


# --- the network -----------------------------------------------------------------------------------------------------


def links(world: World, rounds: int = 9) -> dict[Collective, list[float]]:
    """[bytes/s, seconds of latency] of a hop for each collective, from a small and a large message."""
    if world.world_size == 1:
        return {}

    def call(kind: Collective, whole: torch.Tensor, part: torch.Tensor, times: int) -> None:
        if kind == "all_gather":  # ZeRO-3 starts several gathers before it waits for the first
            for handle in [td.all_gather_into_tensor(whole, part, async_op=True) for _ in range(times)]:
                handle.wait()
            return
        for _ in range(times):
            if kind == "all_reduce":
                td.all_reduce(whole)
            else:
                td.reduce_scatter_tensor(part, whole)

    measured: dict[Collective, list[float]] = {}
    for kind, round_trips in HOPS.items():
        seconds = {}
        for numbers, times in ((SMALL, BURST), (LARGE, 1)):
            whole, part = torch.zeros(numbers), torch.zeros(numbers // world.world_size)

            def body(k: Collective = kind, w: torch.Tensor = whole, p: torch.Tensor = part, n: int = times) -> None:
                call(k, w, p, n)

            seconds[numbers] = median([slowest_rank_s(world, body) for _ in range(rounds)][2:]) / times
        hops = round_trips * (world.world_size - 1)
        moved = hops * SIZE * (LARGE - SMALL) / world.world_size
        # The bandwidth is computed from the difference of two sizes, in which the latency cancels.
        measured[kind] = [moved / max(seconds[LARGE] - seconds[SMALL], 1e-9), seconds[SMALL] / hops]
    return measured


def slowest_rank_s(world: World, body: Callable[[], object]) -> float:
    """Seconds from a barrier until the last rank has ended."""
    dist.barrier(world)
    start = time.perf_counter()
    body()
    # The maximum over ranks, because the engine continues when the collective has ended on all.
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    return float(dist.all_reduce_max(seconds, world))


def kernel_s(world: World, rounds: int = 15) -> float:
    """Seconds of a fixed computation that all ranks do at once: products and passes over memory, as a block has them.

    Divided by the seconds of a single process, it is the slowdown by the other processes of the node.
    """
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 128, generator=generator), torch.randn(128, 512, generator=generator) / 12

    def body() -> None:
        for _ in range(12):
            hidden = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (128,)) @ w)
            hidden @ w.T

    return median([slowest_rank_s(world, body) for _ in range(rounds)][3:])


# --- the engine ------------------------------------------------------------------------------------------------------


class NoiseStream:
    """A stream whose batches are the same noise; rank r of P has every P-th sample."""

    def __init__(self, arch: Arch, micro: int, world: World) -> None:
        generator = torch.Generator().manual_seed(world.rank)
        latents = torch.randn(micro, *arch.latent_shape, generator=generator)
        labels = torch.randint(0, arch.num_classes, (micro,), generator=generator)
        self._batch = (latents, 1.0, labels, torch.arange(micro) * world.world_size + world.rank)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        step = start_step
        while True:
            yield Batch(step, 0, *self._batch)
            step += 1


class Clock:
    """Seconds of each part of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = [{}]
        self._start: float | None = None

    def timed(self, part: str, body: Callable[..., Any]) -> Callable[..., Any]:
        """Run `body` and count its seconds as a part of the current step."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = body(*args, **kwargs)
            row = self.rows[-1]
            row[part] = row.get(part, 0.0) + time.perf_counter() - start
            return result

        return call

    def next(self) -> None:
        """Start the next step."""
        now = time.perf_counter()
        if self._start is not None:
            self.rows[-1]["step"] = now - self._start
            self.rows.append({})
        self._start = now

    def medians(self) -> dict[str, float]:
        """Median seconds of each part over complete steps, without the warm-up."""
        rows = [row for row in self.rows if "step" in row][WARMUP:]
        return {part: median([row.get(part, 0.0) for row in rows]) for part in rows[0]}


def time_run(world: World, arch: Arch, model: str, stage: int, micro: int, steps: int) -> dict[str, float]:
    """Run the engine on latents of noise; returns median seconds of the parts of its steps, and the model's sizes.

    The keys are `forward`, `backward`, `step` (the whole step), `numbers` (AdamW and the EMA), `joined` (copies of the
    plain backend around its all-reduce), and the four counts of `scaling_model.counts`.

    Args:
        world: The processes.
        arch: Shape of the model.
        model: `dense`, or `learngene` for the module that stage 1 trains.
        stage: Stage of ZeRO; 0 is the plain backend.
        micro: Samples of a process.
        steps: Number of steps.
    """
    generator = torch.Generator().manual_seed(0)
    module = (
        DiT(arch, generator=generator) if model == "dense" else build(CONDENSES).condense(arch, None, generator).module
    )
    never = dict.fromkeys(("checkpoint_every", "log_every", "eval_every", "preview_every"), NEVER)
    settings = EngineConfig(**never, peak_tflops=1)  # otherwise the CPU's peak would be measured
    if stage:
        settings = settings.model_copy(
            update={"backend": "deepspeed", "deepspeed": settings.deepspeed.model_copy(update={"stage": stage})}
        )
    trained = [p for p in module.parameters() if p.requires_grad]
    facts = dict(zip(("trained", "tensors", "small", "small_tensors"), map(float, counts(trained))))
    clock = Clock()
    program = Program(
        module, clock.timed("forward", Objective(DiffusionConfig(), arch, 0)), NoiseStream(arch, micro, world)
    )

    # A subclass of the engine's loop, so that the measured step contains all that the loop does.
    class Timed(Run):
        def next_batch(self, batches: Any) -> tuple[Any, float]:
            clock.next()
            return super().next_batch(batches)

        def save(self, step: int) -> None:
            """Write no checkpoint."""

    folder = dist.broadcast_object(tempfile.mkdtemp(prefix="fine_dist-scale-") if world.is_main else "", world)
    with (
        RunDir(Path(folder) / "run").open("benchmark", {}, world) as run_dir,
        Stopper(run_dir, None, world.is_main) as stopper,
    ):
        run = Timed(
            program, steps, micro * world.world_size, OptimConfig(), settings, run_dir, 0, model, world, stopper
        )
        backend: Backend = run.backend
        backend.backward = clock.timed("backward", backend.backward)  # type: ignore[method-assign]
        optimizer: Any = backend.optimizer  # type: ignore[attr-defined]
        optimizer.step = clock.timed("numbers", optimizer.step)
        run.ema.update = clock.timed("numbers", run.ema.update)  # type: ignore[method-assign]
        run.train()
        run.monitor.close()
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    return {**clock.medians(), **facts, "joined": 0.0}


def as_links(measured: dict[Collective, list[float]]) -> dict[Collective, Link]:
    """The result of `links` as links of `scaling_model`."""
    return {kind: Link(*values) for kind, values in measured.items()}
