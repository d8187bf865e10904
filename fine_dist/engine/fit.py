"""`fit`: train a program in a run directory, from its newest checkpoint if it has one.

It wraps the loop (`loop.Run`) in what must hold around it: signal handlers, the heartbeat of all ranks, and the end of
background writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from fine_dist.engine import dist
from fine_dist.engine.heartbeat import Heartbeat
from fine_dist.engine.loop import Run
from fine_dist.engine.program import FitResult, Program
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.world import World


def fit(
    program: Program,
    *,
    steps: int,
    global_batch: int,
    optim: OptimConfig,
    engine: EngineConfig,
    run_dir: RunDir,
    seed: int,
    title: str,
    world: World | None = None,
    stopper: Stopper | None = None,
    claim: Callable[[], None] = lambda: None,
    finished: Callable[[FitResult], None] = lambda result: None,
) -> FitResult:
    """Train `program` to `steps` updates, from the newest checkpoint in `run_dir` if there is one.

    Args:
        global_batch: Samples of an update, over all ranks and accumulation steps.
        seed: Part of the run's identity; seeds `program.before_step`. The caller seeds everything else in the program.
        title: Label of the progress bar.
        world: Rank, world size and device of this process. None: read from the environment.
        stopper: An already entered context that collects requests to stop. None: one for signals, the time limit and
            the files STOP and SAVE in `run_dir`.
        claim: Called on every rank after the first successful step; the run directory is written to from then on.
        finished: Called on every rank with the result, before the last previews are sampled. A caller that saves the
            result does it here, so that neither slow previews nor a request to stop can delay the save.

    Raises:
        ResumeLater: The run was asked to stop, and has saved.
        TrainingError: A loss or gradient is not finite, or a rank died.
        CheckpointError: The checkpoint belongs to another run.
        ConfigError: The batch cannot be divided over ranks and micro-batches.
    """
    world = world or dist.world(engine.device)
    # The stopper is the inner context: signal handlers are restored before the heartbeat explains a lost connection.
    entering = (
        Stopper(run_dir, engine.time_limit_min, world.is_main) if stopper is None else contextlib.nullcontext(stopper)
    )
    with Heartbeat(world), entering as entered:
        run = Run(program, steps, global_batch, optim, engine, run_dir, seed, title, world, entered, claim, finished)
        try:
            return run.train()
        finally:
            # Also after an error: a write that is under way may be the last good checkpoint.
            run.checkpoints.close()
            run.monitor.close()
