"""The classifier of the images at hand: good enough, the same every time, and safe on disk."""

from __future__ import annotations

import json

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode

from fine_dist.core.errors import ArtifactError, ConfigError, DataError
from fine_dist.evaluation.classifier import (
    NUM_FEATURES,
    load_classifier,
    save_classifier,
    train_classifier,
    training_length,
)
from fine_dist.evaluation.features import load_features
from fine_dist.evaluation.frechet import frechet_distance


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images, labels = torch.tensor(data.images).float()[:, None] / 8 - 1, torch.tensor(data.target)
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


@pytest.fixture(scope="module")
def trained(digits):
    train, held_out = digits
    return train_classifier(*train, held_out, seed=0)


def test_it_knows_held_out_digits(trained):
    """The last 297 scans are by other writers than the first 1,500: the harder of the usual splits."""
    assert trained.accuracy >= 0.95


def test_its_training_costs_less_than_ten_seconds_of_a_core_at_ten_gflops(digits):
    """FLOPs and not seconds, which depend on the machine and on what else it does."""
    train, held_out = digits
    with FlopCounterMode(display=False) as counted:
        train_classifier(*train, held_out, seed=0, epochs=1)
    epochs, _ = training_length(len(train[0]))
    assert 0 < epochs * counted.get_total_flops() < 100e9


def test_many_images_are_not_shown_forty_times_each():
    assert [training_length(count) for count in (600, 1500, 60_000, 1_000_000)] == [
        (40, 50),
        (40, 50),
        (8, 100),
        (1, 100),
    ]


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_own_randomness_alone(digits):
    train, held_out = digits
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b = (train_classifier(*train, held_out, seed=1, epochs=1).classifier.state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(before, torch.random.get_rng_state())


def test_real_digits_are_nearer_to_real_digits_than_spoiled_ones_are(digits, trained):
    (train, _), (held_out, _) = digits
    moments = trained.classifier.moments
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    real = moments(train)
    distances = [frechet_distance(real, moments(held_out + level * noise)) for level in (0, 0.5, 1.0, 2.0)]
    assert distances == sorted(distances)


def test_features_and_logits_have_the_shapes_they_promise(digits, trained):
    images = digits[1][0][:5]
    assert trained.classifier.features(images).shape == (5, NUM_FEATURES)
    assert trained.classifier.logits(images).shape == (5, 10)


def test_it_comes_back_from_disk_as_it_was(tmp_path, digits, trained):
    images = digits[1][0]
    back = load_classifier(save_classifier(tmp_path / "classifier", trained))
    assert back.accuracy == trained.accuracy
    assert torch.equal(back.classifier.logits(images), trained.classifier.logits(images))


def test_a_damaged_file_is_an_error(tmp_path, trained):
    folder = save_classifier(tmp_path, trained)
    file = folder / "classifier.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(bytes(blob))
    with pytest.raises(ArtifactError, match="sha256"):
        load_classifier(folder)


def test_a_missing_classifier_says_how_to_get_one(tmp_path):
    with pytest.raises(ArtifactError, match="no classifier in"):
        load_classifier(tmp_path / "nowhere")


def test_images_of_another_size_are_refused(digits, trained):
    with pytest.raises(DataError, match="1x8x8, not 3x8x8"):
        trained.classifier.features(torch.zeros(4, 3, 8, 8))
    with pytest.raises(DataError, match="square"):
        train_classifier(torch.zeros(4, 1, 8, 6), torch.zeros(4).long(), digits[1])
    with pytest.raises(DataError, match="do not fit"):
        train_classifier(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), digits[1])


def test_it_learns_larger_images_too(digits):
    """28 x 28, as garments have: the digits drawn larger."""

    def larger(images):
        return torch.nn.functional.interpolate(images, (28, 28), mode="bilinear")

    (x, y), (held_x, held_y) = digits
    trained = train_classifier(larger(x[:600]), y[:600], (larger(held_x), held_y), epochs=5)
    assert trained.classifier.shape == (1, 28, 28)
    assert trained.accuracy > 0.7  # chance is 0.1; 5 epochs of 600 images


def test_it_is_a_feature_network_with_pooled_features_and_logits(digits, trained):
    classifier, images = trained.classifier, digits[1][0][:6]
    found = classifier(images)
    assert torch.equal(found.pooled, classifier.features(images)) and torch.equal(
        found.logits, classifier.logits(images)
    )
    assert (classifier.name, classifier.distance, classifier.num_features) == (
        "classifier",
        "FD-classifier",
        NUM_FEATURES,
    )
    levels = ((images + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(classifier(levels).pooled, found.pooled, atol=0.05, rtol=0.05)  # one of 256 levels off


@pytest.mark.parametrize(("key", "value"), [("shape", [1, 8]), ("num_classes", 11), ("kind", "model"), ("shape", None)])
def test_a_manifest_that_does_not_fit_is_an_error(tmp_path, trained, key, value):
    folder = save_classifier(tmp_path, trained)
    manifest = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(ArtifactError):
        load_classifier(folder)


def test_a_feature_network_is_loaded_by_its_name_and_another_name_is_refused(tmp_path, trained):
    folder = save_classifier(tmp_path, trained)
    assert load_features("classifier", folder).identity == trained.classifier.identity
    with pytest.raises(ConfigError, match="did you mean 'inception'"):
        load_features("incepton", "x")
    with pytest.raises(ConfigError, match="pt_inception-2015-12-05"):
        load_features("inception", None)
