"""One evaluator: the same numbers for `evaluate`, for a study and while a model trains; classifiers on demand."""

from __future__ import annotations

import json

import pytest
import torch

from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError, DataError
from fine_dist.data.shards import write_shards
from fine_dist.engine import dist
from fine_dist.evaluate import run as evaluate
from fine_dist.evaluation import classifier as classifiers
from fine_dist.evaluation.classifier import Classifier, Trained, classifier_of_shards, save_classifier
from fine_dist.evaluation.evaluator import Evaluator, networks_of, requested_metrics
from fine_dist.evaluation.recording import record
from fine_dist.evaluation.settings import EvaluateConfig, FeaturesConfig
from fine_dist.model.artifact import save_artifact
from fine_dist.model.dit import DiT
from tests.conftest import lively, tiny_arch

SAMPLES = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of the digits' shape that draws something."""
    folder, net = tmp_path_factory.mktemp("model") / "model", lively(DiT(tiny_arch(num_layers=1)), std=0.1)
    about = {"sampler": {"clip": 1.0}, "codec": {"name": "identity", "scaling_factor": 1.0}}
    save_artifact(
        folder, kind="model", method={"name": "scratch"}, arch=net.arch, tensors=net.state_dict(), extra=about
    )
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A classifier with random weights."""
    torch.manual_seed(0)
    net = Classifier().requires_grad_(False).eval()
    return save_classifier(tmp_path_factory.mktemp("features"), Trained(net, 0.5))


def config(shards, features, **more) -> EvaluateConfig:
    data = {"shards": str(shards / "train"), "held_out": str(shards / "held_out")}
    values = {"data": data, "features": str(features), "samples": SAMPLES, "engine": {"device": "cpu"}, **more}
    return validate(EvaluateConfig, {"sampler": {"scheduler": "ddim", "steps": 2, "clip": 1.0}, **values})


def test_a_studys_numbers_are_those_of_evaluate(model, features, digit_shards, tmp_path):
    from fine_dist.study.config import load_study
    from fine_dist.study.graph import plan
    from fine_dist.study.measuring import MeasuredModel, Measuring
    from tests.study.studies import DIGITS, SCRATCH, SMALL

    data = {"shards": str(digit_shards / "train"), "held_out": str(digit_shards / "held_out")}
    changes = {
        **SMALL,
        "tune": {},
        "run_dir": str(tmp_path / "study"),
        "entries": [SCRATCH],
        "main": "scratch",
        "data": {"data": data},
        "features": str(features),
        "samples": SAMPLES,
        "sampler": {"scheduler": "ddim", "steps": 2, "clip": 1.0},
    }
    study = load_study(DIGITS, **changes)
    numbers = Measuring(plan(study)).numbers(MeasuredModel("m", model, next(iter(study.data)), distances=True))
    metrics = ("held_out_loss", "fd_classifier", "accuracy")
    asked = config(digit_shards, features, metrics=metrics, models=(str(model),), run_dir=str(tmp_path / "e"))
    [row] = json.loads(evaluate(asked).read_text())["rows"]
    assert numbers["held_out_loss"] == row["held_out_loss"]
    for metric in ("fd_classifier", "accuracy"):
        assert numbers[metric] == row["scores"][metric]["value"]


def test_alone_and_with_others_a_model_gets_the_same_numbers(model, features, digit_shards):
    """What rank 0 measures by itself while a model trains is what all ranks measure together."""
    evaluator = Evaluator(config(digit_shards, features, metrics=("held_out_loss", "kid")), dist.single_process("cpu"))
    renderer = evaluator.renderer(str(model))
    together = evaluator.measure(renderer).numbers()
    alone = evaluator.scores(renderer, alone=True).numbers()
    loss = evaluator.held_out_loss(renderer.model, renderer.diffusion, alone=True)
    assert together == {"held_out_loss": loss, **alone}


def test_adms_protocol_is_recorded_and_keeps_every_sample(model, features, digit_shards, monkeypatch):
    from fine_dist.evaluation import image_statistics, references

    for module in (image_statistics, references):
        monkeypatch.setattr(module, "SUBSET", 10)
    evaluator = Evaluator(
        config(digit_shards, features, metrics=("precision", "recall"), protocol="adm"), dist.single_process("cpu")
    )
    assert evaluator.protocol()["protocol"] == "adm"
    notes = " ".join(evaluator.scores(evaluator.renderer(str(model))).notes)
    assert f"{SAMPLES} samples against 10 real images" in notes


def test_held_out_data_of_other_classes_are_refused(features, digit_shards, tmp_path):
    net, names = DiT(tiny_arch(num_layers=1)), list("abcdefghij")
    about = {"class_names": names, "codec": {"name": "identity"}}
    save_artifact(
        tmp_path / "m", kind="model", method={"name": "scratch"}, arch=net.arch, tensors=net.state_dict(), extra=about
    )
    with pytest.raises(DataError, match=r"label 0 is 'a' in .* and '0' in"):
        Evaluator(config(digit_shards, features, metrics=("held_out_loss",)), dist.single_process("cpu"))(
            str(tmp_path / "m")
        )


def test_the_same_model_at_another_step_is_a_row_of_its_own(tmp_path):
    protocol = {"samples": 2}
    for step, value in ((1, 0.5), (2, 0.4), (2, 0.3)):
        path = record(tmp_path, protocol, [{"model": "m", "step": step, "held_out_loss": value}], {})
    rows = json.loads(path.read_text())["rows"]
    assert [(row["step"], row["held_out_loss"]) for row in rows] == [(1, 0.5), (2, 0.3)]


# --- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["fid"], r"features\.inception: fid needs weights: .*pytorch-fid/releases/.*--features\.inception FILE"),
        (["fdd"], r"features\.dinov2: fdd needs weights: .*facebook/dinov2-large.*--features\.dinov2 DIR"),
        (["fd_classifier"], r"features\.classifier: fd_classifier needs weights: .*--features\.classifier train"),
    ],
)
def test_a_metric_without_weights_says_where_they_come_from_and_where_they_go(metrics, words):
    with pytest.raises(ConfigError, match=words):
        networks_of(metrics, FeaturesConfig())


def test_metrics_of_any_network_take_the_one_that_is_given():
    assert networks_of(["is", "kid"], FeaturesConfig(classifier="c")) == {"classifier": ["is", "kid"]}
    with pytest.raises(ConfigError, match=r"metrics: 'fidd' is unknown; did you mean 'fid'"):
        requested_metrics(EvaluateConfig(metrics=("fidd",)))


# --- a classifier of the shards --------------------------------------------------------------------------------------


def test_a_classifier_is_trained_once_for_its_shards_and_again_for_others(tmp_path, monkeypatch):
    trainings = []

    def few_epochs(images, labels, held_out):
        trainings.append(len(images))
        return original(images, labels, held_out, epochs=1)

    original = classifiers.train_classifier
    monkeypatch.setattr(classifiers, "train_classifier", few_epochs)
    for name in ("one", "two"):
        latents = torch.rand(60, 1, 8, 8).mul(2).sub(1).numpy()
        write_shards(tmp_path / name, latents, (torch.arange(60) % 10).numpy(), num_classes=10)
    first = classifier_of_shards(tmp_path / "c", str(tmp_path / "one"), None).classifier.identity
    again = classifier_of_shards(tmp_path / "c", str(tmp_path / "one"), None).classifier.identity
    other = classifier_of_shards(tmp_path / "c", str(tmp_path / "two"), None).classifier.identity
    assert first == again != other and trainings == [54, 54]  # a tenth is held out


def test_a_classifier_of_latents_is_refused(tmp_path):
    write_shards(
        tmp_path / "x", torch.rand(8, 4, 4, 4).numpy(), torch.zeros(8).long().numpy(), num_classes=1, codec="v"
    )
    with pytest.raises(ConfigError, match="holds latents of v"):
        classifier_of_shards(tmp_path / "c", str(tmp_path / "x"), None)
