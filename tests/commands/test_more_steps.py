"""A family asked for more steps is trained further on a launcher, and stage 3 fans out over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fine_dist.condense import main as condense
from fine_dist.init import main as init
from fine_dist.train import main as train

ARCH = "{hidden_size: 32, num_layers: 2, num_heads: 4, patch_size: 2, in_channels: 1, input_size: 8, num_classes: 10, learn_sigma: false}"  # noqa: E501
CPU = ("--engine.device", "cpu", "--engine.threads", "1", "--batch", "8")


def steps(folder: Path) -> dict[str, int]:
    return {path.parent.name: json.loads(path.read_text())["steps"] for path in folder.glob("*/DONE.json")}


@pytest.mark.timeout(240)
def test_more_steps_train_a_family_further_and_stage_3_trains_every_target(tmp_path, digit_shards, capsys):
    data = ("--data.shards", str(digit_shards / "train"))
    learngene, family, models = (str(tmp_path / name) for name in ("learngene", "family", "models"))
    assert condense(["--launcher", "here", "--arch", ARCH, *CPU, "--steps", "2", *data, "--run-dir", learngene]) == 0
    assert f"next: fine-dist init --parent {learngene}/learngene" in capsys.readouterr().out
    words = ["--launcher", "local", "--parent", learngene, "--depths", "1", "2", *CPU, *data, "--run-dir", family]
    assert init([*words, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 tasks, 0 done before, 2 to run" in said and "2 of 2 tasks done" in said
    assert said.endswith(f"targets are in {family}/NAME\nnext: fine-dist train --parents {family}\n")
    assert init([*words, "--steps", "4"]) == 0
    assert "0 done before, 2 to run" in capsys.readouterr().out and set(steps(Path(family)).values()) == {4}
    assert init([*words, "--steps", "4"]) == 0
    assert "2 done before, 0 to run" in capsys.readouterr().out
    words = ["--launcher", "local", "--parents", family, *CPU, *data, "--run-dir", models, "--steps"]
    for count in ("1", "2"):
        assert train([*words, count]) == 0
        said = capsys.readouterr().out
        assert "0 done before, 2 to run" in said and said.endswith(f"next: fine-dist sample --model {models}\n")
        assert steps(Path(models)) == dict.fromkeys(steps(Path(family)), int(count))


def test_a_folder_without_a_finished_family_is_refused(tmp_path, capsys):
    assert train(["--parents", str(tmp_path), "--run-dir", str(tmp_path / "t")]) == 2
    assert "holds no family; give the run_dir of a finished `fine-dist init`" in capsys.readouterr().err
    assert train(["--parents", str(tmp_path), "--parent", "x", "--run-dir", str(tmp_path / "t")]) == 2
    assert "exclude each other" in capsys.readouterr().err
