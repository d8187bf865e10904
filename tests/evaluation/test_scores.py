"""Inception Score, precision, recall and KID against naive numpy, and in little memory."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from fine_dist.core.errors import DataError
from fine_dist.evaluation.scores import ClassSums, inception_score, kernel_distance, precision_recall, squared_mmd


def draws(count: int, num: int = 8, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, num, generator=torch.Generator().manual_seed(seed)) + shift


def naive_inception_score(logits: np.ndarray) -> float:
    total = 0.0
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    for row in p:
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(row, mean))
    return math.exp(total / len(p))


def naive_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def radius(x, i):
        return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]

    def covered(x, y):
        radii = [radius(x, i) for i in range(len(x))]
        return np.mean([any(np.linalg.norm(point - x[i]) <= radii[i] for i in range(len(x))) for point in y])

    return covered(real, fake), covered(fake, real)


def naive_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


# --- Inception Score -------------------------------------------------------------------------------------------------


def test_the_inception_score_is_its_formula_over_parts():
    logits = draws(50, 12) * 3
    parts = [naive_inception_score(part.numpy().astype(np.float64)) for part in logits.split(20)]
    mean, deviation = inception_score(logits, split=20)
    assert mean == pytest.approx(np.mean(parts), rel=1e-10) and deviation == pytest.approx(np.std(parts), rel=1e-8)


def test_it_ends_at_one_and_at_the_number_of_classes():
    certain = torch.eye(7).repeat(5, 1) * 1e4  # probabilities of exactly 0 and 1
    assert inception_score(certain)[0] == pytest.approx(7, rel=1e-12)
    assert inception_score(torch.zeros(9, 7)) == (pytest.approx(1, rel=1e-12), 0)


def test_the_order_in_which_images_come_changes_nothing():
    logits, order = draws(50, 12), torch.randperm(50, generator=torch.Generator().manual_seed(0))
    sums = ClassSums.empty(50, 12, split=20)
    for part in order.split(7):
        sums.update(logits[part], part // 20)
    assert sums.score() == pytest.approx(inception_score(logits, split=20), rel=1e-12)


def test_no_images_and_broken_logits_are_errors():
    with pytest.raises(DataError, match="at least one"):
        inception_score(torch.zeros(0, 5))
    with pytest.raises(DataError, match="NaN"):
        inception_score(torch.full((2, 5), float("nan")))


# --- precision and recall --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_precision_and_recall_are_their_definitions(block, shift):
    real, fake = draws(40, 4), draws(30, 4, seed=1, shift=shift)
    expected = naive_precision_recall(real.numpy(), fake.numpy(), 3)
    assert precision_recall(real, fake, block=block) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1  # a test that says something


def test_features_far_from_zero_keep_their_distances():
    """In float32 about zero, distances of size 1 would be lost at 1e4."""
    real, fake = draws(40, 4), draws(30, 4, seed=1, shift=0.5)
    assert precision_recall(real + 1e4, fake + 1e4) == pytest.approx(precision_recall(real, fake), abs=0.04)


def test_one_mode_is_precise_and_recalls_little():
    real = torch.cat([draws(50), draws(50, seed=1, shift=20)])
    precision, recall = precision_recall(real, draws(50, seed=2))
    assert precision > 0.7 and recall <= 0.5


def test_too_few_samples_have_no_neighbours():
    with pytest.raises(DataError, match="3 fake samples have no 3rd"):
        precision_recall(draws(10), draws(3))
    with pytest.raises(DataError, match=r"\[10, 4\]"):
        precision_recall(draws(10), draws(10, 4))


def test_ten_thousand_against_ten_thousand_fit_into_two_gib():
    """Fewer features than Inception's 2048, for time: what grows is the 10,000 x 10,000, 400 MB a table in float32."""
    code = """
import resource, torch
from fine_dist.evaluation.scores import precision_recall
g = torch.Generator().manual_seed(0)
a, b = torch.randn(10_000, 64, generator=g), torch.randn(10_000, 64, generator=g)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
precision_recall(a, b)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1024 - 2 * 80 * 2  # MiB; 2048 features add two copies of 80 MB each


# --- KID -------------------------------------------------------------------------------------------------------------


def test_the_squared_mmd_is_the_unbiased_formula():
    x, y = draws(12, 5), draws(9, 5, seed=1, shift=0.3)
    # products are in float32
    assert squared_mmd(x, y) == pytest.approx(naive_mmd(x.double().numpy(), y.double().numpy()), rel=1e-5)


def test_kid_is_the_mean_over_its_subsets_and_the_same_for_a_seed():
    x, y = draws(60), draws(80, seed=1, shift=0.5)
    found = kernel_distance(x, y, subsets=20, size=30)
    assert found == kernel_distance(x, y, subsets=20, size=30)
    assert found != kernel_distance(x, y, subsets=20, size=30, seed=1)
    everything = squared_mmd(x, y)
    assert found[0] == pytest.approx(everything, abs=3 * found[1])
    whole = kernel_distance(x, x.clone(), subsets=3, size=60)
    # each subset is the whole set, so that cross terms hold every diagonal once: 2 (mean off - mean all)
    assert whole[1] == pytest.approx(0, abs=1e-9)


def test_kid_of_one_distribution_is_near_zero_whatever_the_number():
    for size in (50, 400):
        mean, deviation = kernel_distance(draws(800), draws(800, seed=1), subsets=20, size=size)
        assert abs(mean) < 2 * deviation
    with pytest.raises(DataError, match="at least 2"):
        kernel_distance(draws(1), draws(5))
