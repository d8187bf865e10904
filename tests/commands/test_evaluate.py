"""`evaluate` as a user sees it: any number of processes, every number with its protocol, misfits in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fine_dist.evaluation.recording import table
from fine_dist.testing import run_distributed
from tests.commands.conftest import ARCH, FAST, command, data, refused
from tests.commands.test_export import latent_model, vae  # noqa: F401 - fixtures
from tests.commands.test_sample_command import share


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier of digits that has hardly learned."""
    from fine_dist.data.small_images import digits
    from fine_dist.evaluation.classifier import save_classifier, train_classifier

    parts = [torch.as_tensor(part) for split in ("train", "held_out") for part in digits(split)]
    folder = tmp_path_factory.mktemp("features")
    return save_classifier(folder, train_classifier(parts[0], parts[1], (parts[2], parts[3]), epochs=1))


def argv(models, run_dir, classifier, shards, *more: str) -> list[str]:
    words = ["evaluate", "--models", *map(str, models), "--run-dir", str(run_dir), *data(shards)]
    return [*words, "--features", str(classifier), "--samples", "40", "--sampler.steps", "2", *more]


def read(folder) -> dict:
    return json.loads((folder / "evaluate.json").read_text())


METRICS = ["held_out_loss", "fd_classifier", "accuracy", "is", "precision", "recall", "kid"]


def test_two_processes_measure_what_one_does(trained, classifier, digit_shards, tmp_path):
    words = ["--metrics", *METRICS]
    assert command(argv([trained], tmp_path / "one", classifier, digit_shards, *words)) == 0
    assert run_distributed(share, 2, argv([trained], tmp_path / "two", classifier, digit_shards, *words)) == [0, 0]
    one, two = (read(tmp_path / run) for run in ("one", "two"))
    assert one["protocol"] == two["protocol"] and list(one["rows"][0]["scores"]) == METRICS[1:]
    assert two["rows"][0]["held_out_loss"] == pytest.approx(one["rows"][0]["held_out_loss"], rel=1e-9)
    for metric, score in one["rows"][0]["scores"].items():
        # samples of another batch size differ by 1e-5, which moves a rounded pixel by a level now and then
        assert two["rows"][0]["scores"][metric]["value"] == pytest.approx(score["value"], rel=1e-3, abs=1e-6), metric
    assert two["floors"]["fd_classifier"] == pytest.approx(one["floors"]["fd_classifier"], rel=1e-5)


def test_the_distance_is_that_of_the_samples_that_sample_draws(trained, classifier, digit_shards, tmp_path):
    """Three ways to one number: drawn by evaluate, drawn by sample and measured from its file, and computed here."""
    from fine_dist.evaluation.classifier import load_classifier
    from fine_dist.evaluation.frechet import frechet_distance
    from fine_dist.evaluation.moments import Moments
    from fine_dist.sampling.npz import NpzImages

    sample = ["sample", "--model", str(trained), "--run-dir", str(tmp_path / "s"), "--classes", "balanced"]
    assert command([*sample, "--count", "40", "--sampler.steps", "2", "--formats", "npz"]) == 0
    npz = tmp_path / "s" / "samples.npz"
    words = ["--metrics", "fd_classifier"]
    assert command(argv([trained], tmp_path / "e", classifier, digit_shards, *words)) == 0
    number = read(tmp_path / "e")["rows"][0]["scores"]["fd_classifier"]["value"]
    network = load_classifier(classifier).classifier
    images = torch.from_numpy(next(NpzImages(npz).batches(40)).copy()).permute(0, 3, 1, 2)
    from fine_dist.data.stream import read_all

    real = ((read_all(str(digit_shards / "train"))[0] + 1) * 127.5).round().to(torch.uint8)
    moments = [Moments.of(network.features(x)) for x in (images, real)]
    assert number == pytest.approx(frechet_distance(*moments), rel=1e-6)


def test_files_of_images_are_measured_against_real_ones(trained, tmp_path):
    """EfficientNet's or Inception's weights are not here: the classifier of RGB images stands in for them."""
    from fine_dist.evaluation.classifier import save_classifier, train_classifier
    from fine_dist.sampling.npz import write_samples

    rng = np.random.default_rng(0)
    for name, level in (("real", 60), ("fake", 90)):
        images = rng.integers(0, level * 2, (40, 8, 8, 3), dtype=np.uint8)
        write_samples(tmp_path / f"{name}.npz", [images], count=40, size=(8, 8))
    x = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.arange(60) % 10
    save_classifier(tmp_path / "c", train_classifier(x, y, (x, y), epochs=1))
    words = [
        "evaluate",
        "--models",
        str(tmp_path / "fake.npz"),
        str(tmp_path / "real.npz"),
        "--metrics",
        "fd_classifier",
    ]
    words += ["--reference", str(tmp_path / "real.npz"), "--features.classifier", str(tmp_path / "c")]
    assert command([*words, "--run-dir", str(tmp_path / "e")]) == 0
    fake, real = (row["scores"]["fd_classifier"] for row in read(tmp_path / "e")["rows"])
    assert fake["value"] > 1e-3 > real["value"] >= 0 and fake["name"] == "FD-classifier-40"
    assert len(read(tmp_path / "e")["protocol"]["reference"]) == 64


def test_few_samples_are_said_to_be_few(trained, classifier, digit_shards, tmp_path, capsys):
    words = ["--metrics", "fd_classifier", "precision"]
    assert command(argv([trained], tmp_path, classifier, digit_shards, *words)) == 0
    out = capsys.readouterr().out
    assert "40 samples have a singular covariance of 64 features" in out
    assert "the literature takes 10000 against 10000" in out
    assert "FD-classifier-40" in out


def test_numbers_of_another_protocol_do_not_overwrite_the_first(trained, classifier, digit_shards, tmp_path):
    for seed in ("0", "1", "0"):
        assert command(argv([trained], tmp_path, classifier, digit_shards, "--seed", seed)) == 0
    files = sorted(tmp_path.glob("evaluate*.json"))
    assert len(files) == 2
    first, second = (json.loads(file.read_text()) for file in files[::-1])
    assert {first["protocol"]["seed"], second["protocol"]["seed"]} == {0, 1}
    found = read(tmp_path)
    assert found["protocol"]["seed"] == 0 and len(found["rows"]) == 1
    row = found["rows"][0]
    assert len(row["hash"]) == 64 and row["sampler"]["steps"] == 2 and row["sampler"]["clip"] == 1.0
    for key in ("metrics", "samples", "seed", "weights", "sampler", "held_out", "shards", "features"):
        assert found["protocol"][key] is not None, key


def test_another_model_joins_those_of_the_same_protocol(trained, classifier, digit_shards, tmp_path):
    run = tmp_path / "other"
    assert command(["train", *ARCH, *FAST, "--seed", "5", *data(digit_shards), "--run-dir", str(run)]) == 0
    for model in (trained, run):
        assert command(argv([model], tmp_path, classifier, digit_shards, "--metrics", "held_out_loss")) == 0
    assert [row["model"] for row in read(tmp_path)["rows"]] == [str(trained), str(run)]


def test_averages_and_weights_are_measured_apart(trained, classifier, digit_shards, tmp_path):
    for weights in ("ema", "raw"):
        words = ["--metrics", "held_out_loss", "--weights", weights]
        assert command(argv([trained], tmp_path / weights, classifier, digit_shards, *words)) == 0
    losses = [read(tmp_path / weights)["rows"][0]["held_out_loss"] for weights in ("ema", "raw")]
    assert losses[0] != losses[1]


def test_the_table_never_cuts_a_models_name():
    from rich.console import Console

    name = "runs/" + "a-very-long-name-of-a-run/" * 6 + "model"
    row = {"model": name, "arch": "DiT-B/2-L6", "method": "fine", "held_out_loss": 0.5, "scores": {}}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([row]))
    folded = "".join(line.split("│")[1].strip() for line in console.export_text().splitlines() if line.startswith("│"))
    assert name in folded


# --- what does not fit is one line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metrics", "fyd"], "did you mean 'fid'"),
        (["--metrics", "fid"], "features.inception"),
        (["--metrics", "fdd"], "features.dinov2"),
        (["--features", "/nowhere"], "no classifier in /nowhere"),
        (["--reference", "/nowhere.npz", "--metrics", "fd_classifier"], "/nowhere.npz"),
    ],
)
def test_what_cannot_be_measured_is_refused(more, words, trained, classifier, digit_shards, tmp_path, capsys):
    assert words in refused(argv([trained], tmp_path, classifier, digit_shards, *more), capsys)
    assert not list(tmp_path.iterdir())


def test_labels_and_shapes_that_do_not_fit_the_model_are_refused(digit_shards, classifier, tmp_path, capsys):
    from fine_dist.model.artifact import save_artifact
    from fine_dist.model.dit import DiT
    from tests.conftest import tiny_arch

    for name, fields in (("few", {"num_classes": 4}), ("large", {"input_size": 16})):
        model = DiT(tiny_arch(**fields))
        save_artifact(
            tmp_path / name, kind="model", method={"name": "scratch"}, arch=model.arch, tensors=model.state_dict()
        )
    run = tmp_path / "r"
    assert "10 classes" in refused(argv([tmp_path / "few"], run, classifier, digit_shards), capsys)
    assert "1x16x16" in refused(argv([tmp_path / "large"], run, classifier, digit_shards), capsys)
    words = ["--metrics", "fd_classifier"]
    message = refused(argv([tmp_path / "large"], run, classifier, digit_shards, *words), capsys)
    assert "the classifier takes images of 1x8x8, not 1x16x16" in message


def test_latents_are_measured_through_their_vae_alone(latent_model, vae, classifier, digit_shards, tmp_path, capsys):  # noqa: F811
    words = ["--metrics", "fd_classifier"]
    assert "--vae" in refused(argv([latent_model], tmp_path, classifier, digit_shards, *words), capsys)
    words += ["--vae", str(vae)]
    assert "1x8x8, not 3x" in refused(argv([latent_model], tmp_path, classifier, digit_shards, *words), capsys)
