"""What can go wrong with several ranks: each fault ends every rank within a bounded time, with one message."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_dist.core.errors import EXIT_RESUME, EXIT_USER_ERROR, guard
from fine_dist.engine import dist, heartbeat
from fine_dist.testing import Ranks, run_distributed
from tests.engine.test_resume import assert_same, wait_for_step
from tests.engine.toy import ToyConfig, ToyStream, engine, toy_fit, toy_outcome, toy_program

pytestmark = pytest.mark.distributed


def command(folder: str, config: ToyConfig) -> None:
    """What a rank of a real command does, exit code and messages included."""

    def body() -> None:
        toy_fit(folder, config)

    raise SystemExit(guard(body))  # type: ignore[arg-type]


def errors_in(logs: Path) -> list[str]:
    lines = [line for log in sorted(logs.glob("rank*.log")) for line in log.read_text().splitlines()]
    plain = [re.sub(r"^\[rank \d+\] ", "", line) for line in lines]  # a record of the log has its rank in front
    return [line for line in plain if line.startswith(("error:", "stopped:"))]


LONG = ToyConfig(steps=100_000, engine=engine(checkpoint_every=10))


@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_rank_ends_the_others_soon_with_one_message_that_names_it(tmp_path: Path, victim: int) -> None:
    ranks = Ranks(
        command, 3, str(tmp_path / "run"), ToyConfig(**{**LONG.model_dump(), "global_batch": 12}), logs=tmp_path
    )
    wait_for_step(tmp_path / "run", random.Random(victim).randint(15, 60))
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    begun = time.monotonic()
    codes = ranks.wait(30)
    assert time.monotonic() - begun < 20
    assert codes[victim] == -signal.SIGKILL
    assert [code for rank, code in enumerate(codes) if rank != victim] == [EXIT_USER_ERROR] * 2
    assert len(errors_in(tmp_path)) == 1
    assert f"rank {victim}" in errors_in(tmp_path)[0] and "checkpoint is intact" in errors_in(tmp_path)[0]


def test_a_rank_that_hangs_is_noticed_by_its_silent_heart(tmp_path: Path) -> None:
    ranks = Ranks(command, 2, str(tmp_path / "run"), LONG, logs=tmp_path, env={"FINE_DIST_DEAD_AFTER_S": "3"})
    wait_for_step(tmp_path / "run", 12)
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    ranks.processes[0].join(25)
    assert ranks.processes[0].exitcode == EXIT_USER_ERROR
    ranks.kill()
    assert "rank 1" in errors_in(tmp_path)[0] and "not been heard of" in errors_in(tmp_path)[0]


def test_after_all_ranks_are_killed_the_same_command_ends_with_the_weights_of_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    config = ToyConfig(steps=60, engine=engine(backend="deepspeed", deepspeed={"stage": 2}))
    ranks = Ranks(toy_fit, 2, str(tmp_path / "killed"), config)
    wait_for_step(tmp_path / "killed", 21)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGKILL)
    assert ranks.wait(10) == [-signal.SIGKILL] * 2
    resumed = run_distributed(toy_outcome, 2, tmp_path / "killed", config)[0]
    assert_same(resumed, run_distributed(toy_outcome, 2, tmp_path / "whole", config)[0])


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_any_rank_makes_all_of_them_save_the_same_step_and_exit_75(tmp_path: Path, word: int) -> None:
    ranks = Ranks(command, 2, str(tmp_path / "run"), LONG, logs=tmp_path)
    wait_for_step(tmp_path / "run", 12)
    until = time.monotonic() + 30  # some schedulers repeat themselves; no later signal takes the code from the first
    while ranks.processes[1].exitcode is None and time.monotonic() < until:
        os.kill(ranks.processes[1].pid, word)  # not rank 0
        time.sleep(0.02)
    assert ranks.wait(30) == [EXIT_RESUME] * 2
    assert f"received {signal.Signals(word).name}" in errors_in(tmp_path)[0]
    saved = int((tmp_path / "run" / "checkpoints" / "LATEST").read_text()[5:])
    assert f"saved at step {saved} of" in errors_in(tmp_path)[0]


def watched_through_a_slow_store(folder: str) -> list[str]:
    """The threads that are left when a run has ended while its heartbeat was asking the store."""
    find = heartbeat.Heartbeat._find_failure

    def slowly(self: heartbeat.Heartbeat, *asked: Any) -> Any:
        time.sleep(0.5)
        return find(self, *asked)

    heartbeat.Heartbeat._find_failure = slowly  # type: ignore[method-assign]
    heartbeat.INTERVAL_S = 0.01
    toy_fit(folder, ToyConfig(steps=4, engine=engine()))
    return [thread.name for thread in threading.enumerate()]


def test_a_run_that_ends_leaves_no_thread_that_watches_others(tmp_path: Path) -> None:
    for names in run_distributed(watched_through_a_slow_store, 2, str(tmp_path / "run"), timeout_s=60):
        assert "fine-dist-heartbeat" not in names  # Python ending beside it would abort the process


def test_an_error_on_one_rank_is_told_by_that_rank_alone(tmp_path: Path) -> None:
    ranks = Ranks(bad_data_on_rank_1, 2, str(tmp_path / "run"), logs=tmp_path)
    assert ranks.wait(40) == [EXIT_USER_ERROR] * 2
    assert errors_in(tmp_path) == ["error: shard 7 is gone"]


def bad_data_on_rank_1(folder: str) -> None:
    from fine_dist.core.errors import DataError

    class Bad(ToyStream):
        def batches(self, start_step=0):
            for batch in super().batches(start_step):
                if batch.step == 4 and self.world.rank == 1:
                    raise DataError("shard 7 is gone")
                yield batch

    def body() -> None:
        here = dist.world("cpu")
        toy_fit(folder, LONG, toy_program(LONG, here, stream=Bad(8, here)))

    raise SystemExit(guard(body))  # type: ignore[arg-type]


def test_a_second_run_on_the_same_directory_is_refused_on_every_rank(tmp_path: Path) -> None:
    first = Ranks(command, 2, str(tmp_path / "run"), LONG)
    try:
        wait_for_step(tmp_path / "run", 3)
        second = Ranks(command, 2, str(tmp_path / "run"), LONG, logs=tmp_path)
        assert second.wait(30) == [EXIT_USER_ERROR] * 2
        assert len(errors_in(tmp_path)) == 1
        assert "in use by another live process" in errors_in(tmp_path)[0]
        assert f"pid {first.processes[0].pid}" in errors_in(tmp_path)[0]
    finally:
        first.kill()


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_a_nan_loss_names_step_and_rank_and_skipping_it_leaves_weights_and_moments_untouched(
    tmp_path: Path, stage: int | None
) -> None:
    name, value = run_distributed(nan_on_rank_1, 2, str(tmp_path), stage)[0]
    assert "step 3: the loss is nan on rank 1" in name
    assert value == 0.0


def nan_on_rank_1(folder: str, stage: int | None) -> tuple[str, float]:
    """(the error of `stop`; the largest change of any weight over a skipped step), with accumulation."""
    from fine_dist.core.errors import FineDistError

    choice = {"backend": "plain"} if stage is None else {"backend": "deepspeed", "deepspeed": {"stage": stage}}
    here = dist.world("cpu")

    class Bad(ToyStream):
        def batches(self, start_step=0):
            for batch in super().batches(start_step):
                if batch.step == 2 and self.world.rank == 1:
                    batch.latents[-1] = float("nan")  # in the second micro-batch
                yield batch

    said = ""
    try:
        config = ToyConfig(steps=4, engine=engine(micro_batch=2, **choice))
        toy_fit(f"{folder}/stop", config, toy_program(config, here, stream=Bad(8, here)))
    except FineDistError as error:
        said = str(error)
    ends = []
    for steps in (2, 3):  # step 3 is the bad one
        config = ToyConfig(steps=steps, engine=engine(micro_batch=2, on_bad_loss="skip", **choice))
        fitted = toy_fit(f"{folder}/skip{steps}", config, toy_program(config, here, stream=Bad(8, here)))
        ends.append({name: p.detach().clone() for name, p in fitted.model.named_parameters()})
    if not here.is_main:
        return said, 0.0
    return said, max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0])


def test_the_loss_is_the_mean_over_all_samples_even_when_ranks_have_unequal_losses(tmp_path: Path) -> None:
    rows = run_distributed(unequal_losses, 2, str(tmp_path))[0]
    assert rows == [pytest.approx((1 + 2 + 3 + 4 + 10 + 20 + 30 + 40) / 8)] * 2


def unequal_losses(folder: str) -> list[float]:
    here = dist.world("cpu")
    own = torch.tensor([1.0, 2.0, 3.0, 4.0]) * (10 if here.rank else 1)

    def objective(model, batch):
        out = model(batch.latents, torch.zeros_like(batch.labels), batch.labels)
        return own + 0.0 * out.flatten(1).sum(1)

    config = ToyConfig(steps=2)
    fitted = toy_fit(folder, config, toy_program(config, here, objective=objective))
    return [row["loss"] for row in fitted.rows]
