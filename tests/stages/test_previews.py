"""What is seen of a model while it trains: quick scores of its average, pictures with names, and a row of settings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.commands.conftest import ARCH, command, data, refused
from tests.commands.test_evaluate import classifier  # noqa: F401 - fixture


def train(shards, run, *more: str) -> list[str]:
    words = ["train", *ARCH, *data(shards), "--run-dir", str(run), "--steps", "6", "--batch", "16"]
    words += ["--engine.log-every", "2", "--engine.eval-every", "2", "--engine.device", "cpu", "--sampler.steps", "2"]
    return [*words, "--sampler.clip", "1", *more]


def board(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def plain(digit_shards, tmp_path_factory):
    """The run directory of a training without quick evaluations."""
    run = tmp_path_factory.mktemp("plain") / "t"
    assert command(train(digit_shards, run)) == 0
    return run


@pytest.fixture(scope="module")
def quick(classifier, digit_shards, tmp_path_factory):  # noqa: F811
    """The same training with quick evaluations."""
    run = tmp_path_factory.mktemp("quick") / "t"
    words = ["--quick.every", "4", "--quick.samples", "24", "--quick.features", str(classifier)]
    assert command(train(digit_shards, run, *words)) == 0
    return run


def test_quick_scores_are_taken_every_so_many_steps_and_are_those_of_evaluate(
    quick,
    classifier,  # noqa: F811
    digit_shards,
    tmp_path,
):
    rows = [json.loads(line) for line in (quick / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["fd_classifier"] for row in rows if "fd_classifier" in row}
    assert list(found) == [4, 6]  # every fourth, and the last
    assert [e.step for e in board(quick).Scalars("train/fd_classifier")] == [4, 6]
    words = ["evaluate", "--models", str(quick), *data(digit_shards), "--features", str(classifier)]
    words += ["--metrics", "fd_classifier", "--samples", "24", "--sampler.steps", "2", "--run-dir", str(tmp_path / "e")]
    assert command(words) == 0
    score = json.loads((tmp_path / "e" / "evaluate.json").read_text())["rows"][0]["scores"]["fd_classifier"]
    assert found[6] == pytest.approx(score["value"], rel=1e-4)


def test_quick_scores_are_recorded_with_their_protocol(quick):
    record = json.loads((quick / "evaluate.json").read_text())
    assert [row["step"] for row in record["rows"]] == [4, 6]
    assert record["protocol"]["samples"] == 24 and record["protocol"]["metrics"] == ["fd_classifier"]
    assert record["rows"][0]["scores"]["fd_classifier"]["name"] == "FD-classifier-24"


def test_quick_scores_change_nothing_that_is_trained(quick, plain):
    from fine_dist.model.artifact import load_artifact

    with_, without = (load_artifact(run / "model").tensors for run in (quick, plain))
    assert all(torch.equal(with_[name], without[name]) for name in without)


def test_settings_and_scores_are_a_row_of_tensorboards_table(plain):
    events = board(plain)
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert "final/held_out_loss" in events.Tags()["scalars"]


@pytest.mark.parametrize(("more", "words"), [
    (["--quick.every", "2"], "quick.metrics"),
    (["--quick.every", "2", "--quick.metrics", "fid"], "features.inception"),
    (["--quick.every", "2", "--quick.metrics", "held_out_loss"], "eval_every"),
    (["--vae", "nowhere"], "images, not latents"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_refused_before_anything_is_written(more, words, digit_shards, tmp_path, capsys):
    assert words in refused(train(digit_shards, tmp_path / "t", *more), capsys)
    assert not (tmp_path / "t" / "model").exists() and not (tmp_path / "t" / "config.yaml").exists()


def test_pictures_have_names_and_undecoded_latents_are_called_so():
    from fine_dist.sampling.image_grid import labelled_grid, latents_as_images

    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    plain = labelled_grid(images, ["a", "b", "c", "d"], 2)
    titled = labelled_grid(images, ["a", "b", "c", "d"], 2, title="LATENTS", rows=["one", "two"])
    assert titled.shape[1] > plain.shape[1] and titled.shape[2] > plain.shape[2]
    # a cell is 64 pixels wide under a line of text, and the text is there
    assert (plain[:, :14] < 255).any() and (plain[:, 14 + 1 : 14 + 63, 5:60] == 0).all()
    assert (
        latents_as_images(torch.full((1, 4, 2, 2), 9.0)).unique().tolist() == [255]
        and latents_as_images(torch.zeros(1, 4, 2, 2)).shape[1] == 3
    )
    assert np.asarray(plain).dtype == np.uint8
