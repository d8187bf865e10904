"""Stage 3 with an ancestor to imitate: what is lost beside the noise, and what is recorded of it."""

from __future__ import annotations

import pytest

from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError
from fine_dist.model.artifact import load_artifact
from fine_dist.stages.settings import TrainConfig
from fine_dist.stages.train import TrainStage, run
from tests.conftest import logged_losses, tiny_arch
from tests.stages.test_ancestor import MIDGET, ancestor


def settings(shards, run_dir, **more) -> TrainConfig:
    arch = tiny_arch(**MIDGET).model_dump()
    base = {"run_dir": str(run_dir), "steps": 30, "batch": 16, "arch": arch, "data": {"shards": str(shards / "train")}}
    base |= {"engine": {"device": "cpu", "log_every": 1, "preview_every": 1000}, "optim": {"lr": 2e-3}}
    return validate(TrainConfig, {**base, **more})


def test_a_model_from_scratch_learns_to_give_its_ancestors_output(digit_shards, tmp_path):
    old = ancestor(tmp_path / "a", num_layers=2)
    config = settings(digit_shards, tmp_path / "t", ancestor=str(old), loss={"diffusion": 0})
    model = load_artifact(run(config))
    found = logged_losses(tmp_path / "t")
    assert sum(found[-5:]) < 0.8 * sum(found[:5])  # the mean squared difference to the ancestor alone
    assert model.extra["taught_by"]["hash"] == load_artifact(old).hash
    plain = settings(digit_shards, tmp_path / "p")
    own, others = TrainStage(config).identity(), TrainStage(plain).identity()
    assert own != others and "loss" not in others


def test_a_teacher_without_a_term_and_a_term_without_a_teacher_are_refused(digit_shards, tmp_path):
    old = ancestor(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"would be ignored: loss\.output is 0"):
        run(settings(digit_shards, tmp_path / "t", ancestor=str(old), loss={"output": 0}))
    with pytest.raises(ConfigError, match="give its folder with --ancestor"):
        run(settings(digit_shards, tmp_path / "t", loss={"output": 1}))
    assert TrainStage(settings(digit_shards, tmp_path / "t", ancestor=str(old))).weights.output == 1.0
