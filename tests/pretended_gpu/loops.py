"""The engine's own loop on the pretended GPU, for models of every kind; scenarios run it and read its trace."""

from __future__ import annotations

from tests.pretended_gpu.device import Trace, pretended_gpu  # isort: skip  # before torch

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed_loop import made_up_shards
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.heartbeat import Heartbeat
from fine_dist.engine.loop import Run
from fine_dist.engine.program import Program
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.world import World
from fine_dist.model.arch import Arch
from fine_dist.model.arch import arch as arch_of
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT
from fine_dist.model.flops import train_flops
from fine_dist.model.roles import train_only

GPU = torch.device("cuda", 0)
NEVER = 10**9


def model_of(kind: str, arch: Arch, rank: int | None = None) -> torch.nn.Module:
    """A dense DiT, a factored one that trains whole (`joint`), or one of which sigma alone trains (`sigma`)."""
    generator = torch.Generator().manual_seed(0)
    if kind == "dense":
        return DiT(arch, generator=generator)
    model = FactoredDiT(arch, rank or arch.hidden_size, generator)
    return train_only(model, "scaler") if kind == "sigma" else model


def run_loop(
    kind: str,
    arch: str,
    *,
    rank: int | None = None,
    batch: int = 4,
    steps: int = 3,
    held_out: bool = False,
    watch: Callable[[Run, Trace], None] = lambda run, trace: None,
    world: World | None = None,
    folder: str | None = None,
    **engine: Any,
) -> Trace:
    """Train by the engine's own loop on the pretended GPU.

    Args:
        kind: As `model_of`.
        arch: Name of an architecture.
        rank: Rank of the factors; None: the width.
        watch: Called with the run before it starts.
        world: This process among others; None: alone.
        folder: Where shards and the run directory are, shared by all ranks; None: a temporary one.
        **engine: Settings of the engine. Rows, checkpoints and evaluations are off unless they are given.
    """
    shape = arch_of(arch)
    world = world or World(device=GPU)
    never = {"checkpoint_every": NEVER, "log_every": NEVER, "eval_every": NEVER, "preview_every": NEVER}
    config = EngineConfig(**{**never, "compile": False, **engine})
    with contextlib.ExitStack() as stack:
        root = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        if world.is_main:
            made_up_shards(root / "shards", shape, count=64)
        dist.barrier(world)
        trace = stack.enter_context(pretended_gpu(count=world.local_size))
        model = model_of(kind, shape, rank)
        if config.backend == "deepspeed":
            model.to(
                GPU
            )  # a fake parameter becomes another object when it moves; DeepSpeed expects the one it was given
        data = DataConfig(shards=str(root / "shards"), streams=4)
        batches = {"rank": world.rank, "world_size": world.world_size, "global_batch": batch}
        stream = stack.enter_context(LatentStream(data, seed=0, expect=shape, **batches))
        program = Program(
            model,
            Objective(DiffusionConfig(), shape, 0),
            stream,
            held_out=held_out_loss(shape) if held_out and world.is_main else None,
            flops_per_sample=train_flops(shape),
            tokens_per_sample=shape.num_tokens,
        )
        run_dir = stack.enter_context(RunDir(root / "run").open("toy", {}, world))
        stopper = stack.enter_context(Stopper(run_dir, None, world.is_main))
        stack.enter_context(Heartbeat(world))
        run = Run(program, steps, batch, OptimConfig(), config, run_dir, 0, "pretended", world, stopper)
        watch(run, trace)
        try:
            run.train()
        finally:
            run.checkpoints.close()
            run.monitor.close()
    return trace


def held_out_loss(arch: Arch) -> HeldOutLoss:
    """A measurement on eight made-up samples."""
    return HeldOutLoss(torch.randn(8, *arch.latent_shape), torch.zeros(8, dtype=torch.int64), DiffusionConfig())


def precisions(trace: Trace) -> dict[str, int]:
    """Matrix products by dtype and by what fp32 products were allowed at that time."""
    return {f"{dtype} {precision}": n for (dtype, precision), n in trace.products.items()}
