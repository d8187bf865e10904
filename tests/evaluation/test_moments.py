"""Streaming moments against numpy, merged in any order and over real processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_dist.core.errors import DataError
from fine_dist.evaluation.moments import Moments


def features(count: int = 200, num: int = 6, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, num, generator=g, dtype=torch.float64) @ torch.randn(num, num, generator=g).double() + 3


def assert_same(moments: Moments, x: torch.Tensor) -> None:
    """1e-12: float64 sums of a few hundred numbers."""
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.numpy(), rowvar=False), rtol=1e-11, atol=1e-12)


def test_streaming_in_uneven_batches_equals_numpy_over_everything():
    x = features()
    moments = Moments.empty(6)
    for part in x.split([1, 3, 0, 60, 136]):
        moments.update(part)
    assert_same(moments, x)


@pytest.mark.parametrize("cut", [0, 1, 77, 200])
def test_merging_two_halves_equals_the_whole_wherever_it_is_cut(cut):
    x = features()
    assert_same(Moments.of(x[:cut]).merge(Moments.of(x[cut:])), x)


def test_features_far_from_zero_keep_their_variance():
    """Sums of squares about zero would lose all digits here: 1e8² against a variance of 1."""
    x = features() + 1e8
    moments = Moments.empty(6)
    for part in x.split(7):
        moments.update(part)
    expected = np.cov((x - 1e8).numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-6, atol=1e-6)


def test_float32_features_are_summed_in_float64():
    x = features().float()
    assert_same(Moments.of(x), x.double())


def test_moments_survive_a_safetensors_file(tmp_path):
    from safetensors.torch import load_file, save_file

    moments = Moments.of(features())
    save_file(moments.state(), tmp_path / "m.safetensors")
    back = Moments.from_state(load_file(tmp_path / "m.safetensors"))
    assert back.count == moments.count and torch.equal(back.scatter, moments.scatter)


def test_a_nan_feature_is_an_error_that_names_the_sample():
    x = features()
    x[17, 2] = float("nan")
    with pytest.raises(DataError, match="first: 17"):
        Moments.empty(6).update(x)


def test_a_covariance_of_one_sample_is_an_error():
    with pytest.raises(DataError, match="at least 2"):
        Moments.of(features(1)).covariance()


def test_other_numbers_of_features_do_not_merge():
    with pytest.raises(ValueError, match="6 and 4"):
        Moments.empty(6).merge(Moments.empty(4))


def _rank_moments(rank_counts: list[int]) -> Moments:
    import torch.distributed as dist

    cuts = np.cumsum([0, *rank_counts])
    rank = dist.get_rank()
    return Moments.of(features()[cuts[rank] : cuts[rank + 1]]).all_reduce()


def _start_and_reduce(rank_counts: list[int]) -> Moments:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return _rank_moments(rank_counts)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("counts", [[100, 100], [150, 0, 50]])
def test_processes_with_unequal_shares_agree_on_the_moments_of_the_whole(counts):
    from fine_dist.testing import run_distributed

    for moments in run_distributed(_start_and_reduce, len(counts), counts):
        assert_same(moments, features())


def test_without_processes_a_reduction_changes_nothing():
    moments = Moments.of(features())
    assert moments.all_reduce() is moments
