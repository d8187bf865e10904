"""The Fréchet distance against scipy's matrix square root and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from fine_dist.core.errors import DataError
from fine_dist.evaluation.frechet import frechet_distance, frechet_from
from fine_dist.evaluation.moments import Moments


def naive(mean_a, cov_a, mean_b, cov_b) -> float:
    """The textbook formula."""
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    gap = (mean_a - mean_b).numpy()
    return float(gap @ gap + np.trace(cov_a.numpy()) + np.trace(cov_b.numpy()) - 2 * np.trace(root))


def gaussian(num: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    factor = torch.randn(num, rank, generator=g, dtype=torch.float64)
    return torch.randn(num, generator=g, dtype=torch.float64), factor @ factor.T / rank


@pytest.mark.parametrize("num", [1, 2, 16, 64])
def test_regular_covariances_agree_with_sqrtm(num):
    a, b = gaussian(num, num + 20, 0), gaussian(num, num + 20, 1)
    assert frechet_from(*a, *b) == pytest.approx(naive(*a, *b), rel=1e-9)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(3, 64), (64, 3), (5, 9), (1, 1)])
def test_singular_covariances_agree_with_sqrtm(rank_a, rank_b):
    """1e-5: it is sqrtm that loses half its digits on a singular product; the next test shows it is not us."""
    a, b = gaussian(32, rank_a, 2), gaussian(32, rank_b, 3)
    assert frechet_from(*a, *b) == pytest.approx(naive(*a, *b), rel=1e-5)


def test_singular_diagonal_covariances_have_their_closed_form():
    a, b = torch.tensor([4.0, 0, 9, 0, 1]), torch.tensor([1.0, 5, 0, 0, 1])
    expected = float(((a.sqrt() - b.sqrt()) ** 2).sum())
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()).Q
    zero = torch.zeros(5)
    found = frechet_from(zero, turn @ a.diag().double() @ turn.T, zero, turn @ b.diag().double() @ turn.T)
    assert found == pytest.approx(expected, rel=1e-12)


def test_equal_sets_are_at_distance_zero_even_with_fewer_samples_than_features():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-10)


def test_a_shift_costs_its_square():
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(Moments.of(x), Moments.of(x + 0.5)) == pytest.approx(8 * 0.25, rel=1e-9)


def test_the_distance_is_symmetric():
    a, b = gaussian(16, 30, 4), gaussian(16, 5, 5)
    assert frechet_from(*a, *b) == pytest.approx(frechet_from(*b, *a), rel=1e-10)


def test_statistics_of_other_features_are_an_error():
    with pytest.raises(DataError, match="same features"):
        frechet_from(*gaussian(8, 8, 0), *gaussian(9, 9, 0))


def test_a_matrix_that_is_no_covariance_is_an_error():
    zero, matrix = torch.zeros(2), torch.tensor([[1.0, 0], [0, -1]])
    with pytest.raises(DataError, match="not a covariance"):
        frechet_from(zero, matrix, zero, torch.eye(2))


def test_nan_statistics_are_an_error():
    zero = torch.zeros(2)
    with pytest.raises(DataError, match="NaN"):
        frechet_from(zero * float("nan"), torch.eye(2), zero, torch.eye(2))


def test_both_ways_agree_where_both_are_exact():
    from fine_dist.evaluation import frechet

    a, b = gaussian(48, 200, 6), gaussian(48, 300, 7)
    quick = frechet._fast_trace(a[1], b[1], float(a[1].trace() + b[1].trace()))
    safe = torch.linalg.svdvals(frechet._root(a[1], 2e-16).T @ frechet._root(b[1], 2e-16)).sum()
    assert quick == pytest.approx(float(safe), rel=1e-12)


@pytest.mark.parametrize("power", [4, 8, 12, 15])
def test_badly_conditioned_covariances_keep_their_digits(power):
    """Variances over `power` decades; a commuting pair has a closed form. The quick way knows when it is not exact."""
    variances = torch.logspace(0, -power, 40, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).double()).Q
    zero = torch.zeros(40)
    found = frechet_from(zero, turn @ variances.diag() @ turn.T, zero, turn @ (2 * variances).diag() @ turn.T)
    assert found == pytest.approx(float(variances.sum() * (2**0.5 - 1) ** 2), rel=1e-6)


def test_float32_statistics_with_a_singular_covariance_are_accepted_and_mean_what_they_say():
    """As `.npz` references of few images are stored: rounding leaves eigenvalues below zero."""
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).double() * torch.logspace(0, -3, 128)
    y = torch.randn(300, 128, generator=torch.Generator().manual_seed(1)).double() * torch.logspace(0, -3, 128)
    a, b = Moments.of(x), Moments.of(y)
    exact = frechet_distance(a, b)
    single = a.covariance().float()
    assert torch.linalg.eigvalsh(single.double()).min() < -1e-9
    assert frechet_from(a.mean.float(), single, b.mean, b.covariance()) == pytest.approx(exact, rel=1e-3)
    # the same matrix, said to be exact to 16 digits, is no covariance
    with pytest.raises(DataError, match="not a covariance"):
        frechet_from(a.mean, single.double(), b.mean, b.covariance())


def test_a_float32_matrix_that_is_no_covariance_is_still_an_error():
    zero, matrix = torch.zeros(3), torch.diag(torch.tensor([1.0, 1.0, -1e-3]))
    with pytest.raises(DataError, match="not a covariance"):
        frechet_from(zero, matrix, zero, torch.eye(3))
    with pytest.raises(DataError, match="not a covariance"):
        frechet_from(zero, torch.eye(3), zero, matrix)
