"""A family that is stopped, killed or damaged continues from its saved states when the same command runs again."""

from __future__ import annotations

import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from fine_dist.core.errors import ResumeLater
from fine_dist.data.settings import DataConfig
from fine_dist.engine import dist
from fine_dist.engine.settings import LoopConfig, OptimConfig
from fine_dist.family.config import InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.family.train_family import run_pack
from fine_dist.init import main as init
from fine_dist.launchers.state_table import StateTable
from fine_dist.model.artifact import load_artifact
from tests.conftest import logged_rows
from tests.family.tools import NAMES, STEPS, init_argv, largest_difference, run_here, solo, start_process


def test_running_it_again_trains_nothing_and_a_grown_grid_only_what_is_new(family, learngene, shards, tmp_path):
    grown = tmp_path / "family"
    shutil.copytree(family, grown)
    before = {name: (grown / name / "DONE.json").stat().st_mtime_ns for name in NAMES}
    again = run_here(init_argv(learngene, shards, grown, "--seeds", "0", "1", "--launcher", "here"))
    assert again.returncode == 0, again.stderr
    more = run_here(init_argv(learngene, shards, grown, "--seeds", "0", "1", "2", "--launcher", "local"))
    assert more.returncode == 0, more.stdout + more.stderr
    assert {name: (grown / name / "DONE.json").stat().st_mtime_ns for name in NAMES} == before
    assert {row.state for row in StateTable(grown).rows()} == {"done"} and len(StateTable(grown).rows()) == 6


def test_a_killed_family_goes_on_where_it_was_and_ends_bit_by_bit_the_same(family, learngene, shards, tmp_path):
    run_dir = tmp_path / "killed"
    command = init_argv(learngene, shards, run_dir, "--seeds", "0", "1", "--launcher", "here")
    process = start_process(command)
    until = time.monotonic() + 120
    log = run_dir / NAMES[0] / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 4):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run_dir / NAMES[0] / "DONE.json").exists()
    again = run_here(command)
    assert again.returncode == 0, again.stderr
    uninterrupted = tmp_path / "uninterrupted"
    straight = run_here(init_argv(learngene, shards, uninterrupted, "--seeds", "0", "1", "--launcher", "here"))
    assert straight.returncode == 0, straight.stderr
    for name in NAMES:
        ours, theirs = (load_artifact(place / name / "target").tensors for place in (run_dir, uninterrupted))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert logged_rows(run_dir / name) == logged_rows(uninterrupted / name)


def test_a_signal_saves_and_asks_to_be_started_again(learngene, shards, tmp_path):
    run_dir = tmp_path / "stopped"
    command = init_argv(learngene, shards, run_dir, "--launcher", "here", "--steps", "100000")
    process = start_process(command)
    until = time.monotonic() + 120
    log = run_dir / NAMES[0] / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command continues" in stderr
    assert list((run_dir / "packs").glob("*.state.safetensors"))


def test_a_time_limit_or_the_word_stop_saves_and_the_same_command_goes_on(family, learngene, shards, tmp_path):
    run_dir = tmp_path / "family"
    command = init_argv(learngene, shards, run_dir, "--seeds", "0", "1", "--launcher", "here")
    limited = run_here([*command, "--engine.time-limit-min", "0.00001"])
    assert limited.returncode == 75 and "time limit" in limited.stderr
    (run_dir / "STOP").touch()  # left from before: the user starts the family again, so it does not count
    config = InitConfig(
        run_dir=str(run_dir), parent=str(learngene.folder), depths=(2, 3), seeds=(0, 1), steps=STEPS, batch=16,
        data=DataConfig(shards=str(shards / "train"), held_out=str(shards / "held_out")), optim=OptimConfig(lr=0.01),
        engine=LoopConfig(device="cpu", log_every=1, checkpoint_every=2, eval_every=5),
    )  # fmt: skip
    table = StateTable(run_dir)
    with pytest.raises(ResumeLater, match="STOP"):
        run_pack(Family(config), Family(config).packs()[0], table, dist.single_process("cpu"))
    assert {row.deaths for row in table.rows()} == {0}  # a clean stop is no death: packs stay as large as they were
    done = run_here(command)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        ours, theirs = (load_artifact(place / name / "target").tensors for place in (run_dir, family))
        assert largest_difference(ours, theirs) < 1e-4


def test_more_steps_go_on_from_where_a_target_ended(family, learngene, shards, tmp_path):
    grown = tmp_path / "family"
    shutil.copytree(family, grown)
    more = run_here(
        init_argv(learngene, shards, grown, "--seeds", "0", "1", "--launcher", "here", "--steps", str(STEPS + 4))
    )
    assert more.returncode == 0, more.stderr
    rows = logged_rows(grown / NAMES[0])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 5))
    losses, _ = solo(learngene, (2, 0, 0.01), shards / "train", STEPS + 4)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)


def test_targets_planned_apart_train_one_after_the_other_and_go_on_where_they_were(learngene, shards, tmp_path):
    config = InitConfig(
        run_dir=str(tmp_path / "run"), parent=str(learngene.folder), depths=(2, 3), steps=6, batch=16,
        data=DataConfig(shards=str(shards / "train")), optim=OptimConfig(lr=0.01),
        engine=LoopConfig(device="cpu", log_every=1, checkpoint_every=2),
    )  # fmt: skip
    family = Family(config)
    family.check()
    [pack] = family.packs()
    pack = replace(pack, sequential=True)
    table = StateTable(tmp_path / "run")
    table.add([member.name for member in family.members])
    stop = tmp_path / "run/STOP"
    stop.touch()
    with pytest.raises(ResumeLater, match="the state of 1 targets is saved"):
        run_pack(family, pack, table, dist.single_process("cpu"))
    stop.unlink()
    assert [len(logged_rows(tmp_path / "run" / pack.jobs[0])), (tmp_path / "run" / pack.jobs[1]).exists()] == [1, False]
    run_pack(family, pack, table, dist.single_process("cpu"))
    for name in pack.jobs:
        losses, _ = solo(learngene, (int(name[1]), 0, 0.01), shards / "train", 6)
        assert [row["loss"] for row in logged_rows(tmp_path / "run" / name)] == pytest.approx(losses, rel=1e-5)
    assert {row.state for row in table.rows()} == {"done"}


def test_targets_whose_states_are_all_damaged_are_refused_in_one_line_after_the_others_have_trained(
    learngene, shards, tmp_path, capsys
):
    run_dir = tmp_path / "damaged"
    command = init_argv(learngene, shards, run_dir, "--pack.max-jobs", "1", "--launcher", "here", "--steps", "4")[3:]
    assert init([*command, "--engine.time-limit-min", "0.00001"]) == 75
    [state] = (run_dir / "packs").glob("*.state.safetensors")  # of the deeper target, which comes first
    state.write_bytes(state.read_bytes()[:-9])
    capsys.readouterr()
    assert init(command) == 2
    stderr = capsys.readouterr().err
    assert re.search(r"^error: all saved states of L3-s0-lr0.01 in .* to start over here at step 0$", stderr, re.M), (
        stderr
    )
    assert {row.name: row.state for row in StateTable(run_dir).rows()} == {NAMES[0]: "done", NAMES[2]: "failed"}
    state.with_name(state.name + ".damaged").unlink()
    assert init(command) == 0
    assert [row["step"] for row in logged_rows(run_dir / NAMES[2])] == [1, 2, 3, 4]
