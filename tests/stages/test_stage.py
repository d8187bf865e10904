"""A stage from settings to artifact: what it records, in which order it ends, and which data it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from fine_dist.artifacts.load import load_model
from fine_dist.core.config import validate
from fine_dist.core.errors import DataError
from fine_dist.data.settings import DataConfig
from fine_dist.data.shards import write_shards
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist, stopping
from fine_dist.engine.run_cost import RunCost
from fine_dist.evaluation.evaluator import Evaluator
from fine_dist.evaluation.settings import EvaluateConfig
from fine_dist.model.arch import Arch
from fine_dist.model.flops import forward_macs
from fine_dist.stages.blueprint import check_labels, fit_arch
from fine_dist.stages.condense import run as condense
from fine_dist.stages.settings import CondenseConfig, TrainConfig
from fine_dist.stages.train import run as train
from tests.conftest import DIGITS, tiny_arch

ARCH = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, **DIGITS}
STEPS, BATCH = 2, 4


def settings(shards, run_dir, **more):
    return {
        "run_dir": str(run_dir),
        "data": {"shards": str(shards / "train"), "held_out": str(shards / "held_out"), "held_out_samples": 16},
        "steps": STEPS,
        "batch": BATCH,
        "engine": {"device": "cpu", "log_every": 1, "eval_every": 1},
        "sampler": {"steps": 1, "clip": 1.0},
        **more,
    }


@pytest.fixture(scope="module")
def model(digit_shards, tmp_path_factory):
    """The run directory of a model of the digits."""
    folder = tmp_path_factory.mktemp("train") / "run"
    train(validate(TrainConfig, settings(digit_shards, folder, arch=ARCH)))
    return folder


def done(run_dir) -> dict:
    return json.loads((run_dir / "DONE.json").read_text())


def test_a_run_records_what_it_cost(model):
    cost = RunCost.from_json(done(model))
    arch = Arch(**ARCH)
    assert (cost.steps, cost.samples) == (STEPS, STEPS * BATCH)
    assert cost.flops == cost.samples * 6 * forward_macs(arch)  # forward, and twice as much backward
    assert cost.stored == cost.trained == arch.count()
    assert cost.seconds > 0


@pytest.fixture(scope="module")
def condensed(model, digit_shards, tmp_path_factory):
    """The run directory of a learngene that is distilled from the model."""
    folder = tmp_path_factory.mktemp("condense") / "run"
    method = {"name": "fine", "rank": 32, "initial": "joint"}
    condense(validate(CondenseConfig, settings(digit_shards, folder, ancestor=str(model), method=method)))
    return folder


def test_a_teachers_forward_pass_is_part_of_the_cost(model, condensed):
    teacher = 2 * forward_macs(Arch(**ARCH))
    assert RunCost.from_json(done(condensed)).flops > STEPS * BATCH * (teacher + 4 * forward_macs(Arch(**ARCH), 32))


def test_terms_of_the_loss_are_logged_one_by_one_and_add_up(condensed, capsys):
    rows = [json.loads(line) for line in (condensed / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == STEPS
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_diffusion"] + row["loss_output"], rel=1e-6)
    assert {"loss_diffusion", "loss_output"} <= done(condensed)["losses"].keys()


def test_the_artifact_is_saved_before_the_last_previews_and_a_stop_ends_them(
    digit_shards, tmp_path, monkeypatch, caplog
):
    seen = []

    def used_up(self) -> str:
        seen.append((tmp_path / "run" / "DONE.json").exists() and (tmp_path / "run" / "model").exists())
        return "received SIGTERM"

    monkeypatch.setattr(stopping.Budget, "used_up", used_up)
    train(validate(TrainConfig, settings(digit_shards, tmp_path / "run", arch=ARCH)))
    assert seen == [True]  # asked once, at the first call of the model, and by then everything was saved
    assert "has 0 of 4 rows: received SIGTERM" in caplog.text
    assert done(tmp_path / "run")["steps"] == STEPS


def test_previews_end_when_their_time_is_used_up():
    class Stopper:
        reason = ""

        def must_stop(self) -> bool:
            return False

    assert stopping.Budget(Stopper(), 60).used_up() == ""
    assert "more than -1 s" in stopping.Budget(Stopper(), -1).used_up()


def test_a_runs_held_out_loss_is_the_evaluators(model, digit_shards):
    data = settings(digit_shards, model)["data"]
    config = EvaluateConfig(data=data, metrics=("held_out_loss",))
    trained = load_model(model)[0]
    alone = Evaluator(config, dist.single_process("cpu"), held_out_samples=16)
    assert alone.held_out_loss(trained, DiffusionConfig()) == done(model)["losses"]["held_out_loss"]


# --- classes and shapes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Shards of 10 classes that are no digits."""
    folder = tmp_path_factory.mktemp("letters")
    latents, labels = torch.randn(64, 1, 8, 8).numpy(), (torch.arange(64) % 10).numpy()
    for split in ("train", "held_out"):
        write_shards(folder / split, latents, labels, num_classes=10, class_names=tuple("abcdefghij"))
    return folder


def test_other_classes_than_the_parents_are_refused_with_the_remedy(model, letters, tmp_path):
    config = validate(TrainConfig, settings(letters, tmp_path / "run", parent=str(model)))
    with pytest.raises(DataError, match=r"label 0 is '0' in .* and 'a' in .*--keep-labels"):
        train(config)
    train(config.model_copy(update={"keep_labels": True}))
    assert done(tmp_path / "run")["steps"] == STEPS


def test_without_names_the_number_of_classes_is_compared(digit_shards):
    data = DataConfig(shards=str(digit_shards / "train"))
    with pytest.raises(DataError, match=r"knows 1000 classes, and .* has 10: label 0 .*set this"):
        check_labels((), 1000, "DiT-XL", data, keep_labels=False, remedy="set this")
    check_labels((), 10, "DiT-XL", data, keep_labels=False, remedy="set this")
    check_labels((), 1000, "DiT-XL", data, keep_labels=True, remedy="set this")


def test_an_architecture_takes_from_the_shards_what_it_leaves_open(digit_shards):
    data = DataConfig(shards=str(digit_shards / "train"))
    found = fit_arch(validate(Arch, {"name": "DiT-S/2", "num_classes": 12}), data)
    assert (found.latent_shape, found.num_classes, found.num_heads) == ((1, 8, 8), 12, 6)
    assert fit_arch(tiny_arch(), data) == tiny_arch()
    assert fit_arch(Arch(), DataConfig(shards="/nowhere")) == Arch()


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1152, 16), (32, 1), (640, 10), (200, 2)])
def test_heads_follow_from_the_width(width, heads):
    assert validate(Arch, {"hidden_size": width}).num_heads == heads
