"""On a GPU a step is queued whole: whatever would make the host wait inside it is an error of torch's own check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed_loop import made_up_shards
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.loop import Run
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.world import World
from tests.engine.toy import ARCH, ToyConfig, engine, toy_program

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]
STEPS = 8


def never_waiting(body: Callable[..., Any], step: Callable[[], int]) -> Callable[..., Any]:
    """`body`, in which a call that waits for the device raises, once the first steps have set everything up."""

    def call(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if step() >= 2 else "default")
        try:
            return body(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


def trained(folder: Path, shards: Path, kind: str, late: bool, checked: bool) -> list[float]:
    """The losses of a run. checked: no step may wait between its batch and its update."""
    config = ToyConfig(kind=kind, steps=STEPS, engine=engine(device="cuda", micro_batch=4, checkpoint_every=STEPS))
    world = World(device=torch.device("cuda", 0))
    data = DataConfig(shards=str(shards), streams=4)
    with LatentStream(data, seed=0, global_batch=config.global_batch, expect=ARCH) as stream:
        program = toy_program(config, world, stream=stream)
        with RunDir(folder).open("toy", {}, world) as run_dir, Stopper(run_dir, None, True) as asked:
            settings = (config.steps, config.global_batch, config.optim, config.engine)
            run = Run(program, *settings, run_dir, 0, "toy", world, asked)
            assert run.reads_late  # as it is by itself on an accelerator
            run.reads_late = late
            if checked:
                at = [-1]
                program.before_step = lambda step, generator: at.__setitem__(0, step)
                for name in ("next_batch", "gradients", "update"):
                    setattr(run, name, never_waiting(getattr(run, name), lambda: at[0]))
            try:
                return [row["loss"] for row in run.train().rows if "loss" in row]
            finally:
                run.checkpoints.close()
                run.monitor.close()


@pytest.mark.parametrize("kind", ["dense", "joint", "sigma"])
def test_no_call_of_a_step_waits_for_the_gpu_and_reading_late_changes_no_loss(tmp_path: Path, kind: str) -> None:
    shards = made_up_shards(tmp_path / "shards", ARCH, count=64)
    losses = trained(tmp_path / "late", shards, kind, late=True, checked=True)
    assert len(losses) == STEPS
    assert losses == trained(tmp_path / "at once", shards, kind, late=False, checked=False)


def test_what_is_copied_to_a_gpu_lies_in_page_locked_memory() -> None:
    objective = Objective(DiffusionConfig(), ARCH, 0)
    for step in (0, 1):  # drawn at once, and ahead
        draws = objective.draws(step, torch.arange(4), pin=True)
        assert draws.noise.is_pinned() and draws.t.is_pinned() and draws.drop.is_pinned()
