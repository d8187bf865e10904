"""Runs that are extended, moved, stopped or refused: what a run is, is its identity and not its paths."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fine_dist.__main__ import main as fine_dist
from fine_dist.core.regular_files import read_rows
from fine_dist.launchers.state_table import StateTable
from fine_dist.model.artifact import load_artifact
from tests.commands.conftest import ARCH, data
from tests.commands.test_commands import FAST

ROOT = Path(__file__).resolve().parents[2]


def condense(shards: Path, run: Path, *more: str) -> int:
    return fine_dist(["condense", *ARCH, *FAST, *data(shards), "--run-dir", str(run), "--launcher", "here", *more])


@pytest.fixture(scope="module")
def six(digit_shards, tmp_path_factory) -> Path:
    """A condense run of 6 steps."""
    run = tmp_path_factory.mktemp("six") / "run"
    assert condense(digit_shards, run) == 0
    return run


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def test_more_steps_go_on_from_a_finished_run_bit_by_bit(six, digit_shards, tmp_path):
    shutil.copytree(six, tmp_path / "run")
    assert condense(digit_shards, tmp_path / "run", "--steps", "10") == 0
    assert condense(digit_shards, tmp_path / "whole", "--steps", "10") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    names = ("tensors.safetensors", "raw.safetensors")
    for name in names:
        ours, theirs = ((tmp_path / run / "learngene" / name).read_bytes() for run in ("run", "whole"))
        assert ours == theirs
    assert json.loads((tmp_path / "run" / "DONE.json").read_text())["steps"] == 10


def test_a_schedule_that_knows_its_end_is_another_run_when_it_is_longer(digit_shards, tmp_path, capsys):
    cosine = ("--optim.schedule", "cosine")
    assert condense(digit_shards, tmp_path / "run", *cosine) == 0
    assert condense(digit_shards, tmp_path / "run", *cosine, "--steps", "10") == 2
    assert "steps: 6 there, 10 now" in capsys.readouterr().err


def test_a_moved_run_learngene_and_data_set_are_the_same(six, digit_shards, tmp_path, capsys):
    shutil.copytree(six, tmp_path / "moved")
    shutil.copytree(digit_shards, tmp_path / "shards")
    assert condense(tmp_path / "shards", tmp_path / "moved") == 0
    assert "finished before" in capsys.readouterr().out
    train = ["train", *FAST, "--launcher", "here", "--run-dir", str(tmp_path / "train")]
    assert fine_dist([*train, *data(digit_shards), "--parent", str(six)]) == 0
    again = [*train, *data(tmp_path / "shards"), "--parent", str(tmp_path / "moved"), "--steps", "8"]
    assert fine_dist(again) == 0
    assert losses(tmp_path / "train")[-1][0] == 8


def test_a_run_of_other_data_is_refused_although_the_path_is_the_same(six, digit_shards, tmp_path, capsys):
    shutil.copytree(six, tmp_path / "run")
    shards = tmp_path / "shards"
    shutil.copytree(digit_shards, shards)
    assert condense(shards, tmp_path / "run", "--steps", "8") == 0
    shutil.copytree(digit_shards / "held_out", shards / "train", dirs_exist_ok=True)
    assert condense(shards, tmp_path / "run", "--steps", "12") == 2
    assert "data.hash" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--data.held-out", "{wide}"], ["--data.shards", "nowhere"], ["--loss.diffusion", "0"]]
)
def test_a_refused_start_leaves_the_directory_free(wrong, digit_shards, tmp_path, capsys):
    wide = tmp_path / "wide"
    shutil.copytree(digit_shards / "held_out", wide)
    manifest = json.loads((wide / "manifest.json").read_text())
    manifest["latent_shape"] = [1, 16, 16]
    (wide / "manifest.json").write_text(json.dumps(manifest))
    words = [word.format(wide=wide) for word in wrong]
    assert condense(digit_shards, tmp_path / "run", *words) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert condense(digit_shards, tmp_path / "run", "--seed", "5") == 0  # and another run may have it


def test_an_ancestor_that_is_given_is_used(six, digit_shards, tmp_path, capsys):
    assert condense(digit_shards, tmp_path / "run", "--ancestor", str(six)) == 0
    assert "ancestor: embedders and final layer copied, block biases copied, block weights" in capsys.readouterr().out
    assert (
        load_artifact(tmp_path / "run" / "learngene").extra["ancestor"]["hash"] == load_artifact(six / "learngene").hash
    )


def test_a_damaged_done_is_one_line_with_its_remedy(six, digit_shards, tmp_path, capsys):
    shutil.copytree(six, tmp_path / "run")
    (tmp_path / "run" / "DONE.json").write_text("[1")
    assert condense(digit_shards, tmp_path / "run") == 2
    assert "DONE.json is damaged" in capsys.readouterr().err
    (tmp_path / "run" / "DONE.json").unlink()  # the remedy
    assert condense(digit_shards, tmp_path / "run") == 0


def started(digit_shards: Path, run: Path) -> subprocess.Popen[str]:
    """A long run as a process of its own, past its first rows."""
    words = ["condense", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(run), "--launcher", "here"]
    words += ["--steps", "1000000", "--engine.checkpoint-every", "50"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "fine_dist", *words], env=env, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(losses(run)) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    return process


def test_ctrl_c_saves_and_says_so(digit_shards, tmp_path):
    process = started(digit_shards, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "SIGINT" in said and "the same command continues" in said
    step = int((tmp_path / "run" / "checkpoints" / "LATEST").read_text()[5:])
    assert f"saved at step {step} " in said


def test_an_interrupted_command_says_what_is_true_of_its_run(six, digit_shards, tmp_path, monkeypatch, capsys):
    def interrupt(module, config, launcher):
        raise KeyboardInterrupt

    def said(run: Path) -> str:
        assert condense(digit_shards, run, "--steps", "10") == 130
        return capsys.readouterr().err

    monkeypatch.setattr("fine_dist.launchers.entry.launch", interrupt)
    assert said(tmp_path / "new") == "interrupted; nothing was saved yet; the same command starts again\n"
    assert not (tmp_path / "new").exists()
    shutil.copytree(six, tmp_path / "run")
    assert said(tmp_path / "run") == "interrupted; the run is finished\n"
    (tmp_path / "run" / "DONE.json").unlink()
    assert said(tmp_path / "run") == "interrupted; the same command continues from the last checkpoint\n"

    family = tmp_path / "family"
    words = ["init", *data(digit_shards), "--run-dir", str(family), "--parent", str(six), "--depths", "2"]
    assert fine_dist(words) == 130 and "nothing was started yet" in capsys.readouterr().err
    table = StateTable(family)
    table.add(["L2", "L3"])
    table.finish("L2", "done")
    assert fine_dist(words) == 130 and "1 of 2 targets are done" in capsys.readouterr().err
