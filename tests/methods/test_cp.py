"""The decomposition against TensorLy's, and on tensors whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac
from torch.utils.flop_counter import FlopCounterMode

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.fine.cp import compose, decompose, directions, jennrich, measured, sweep_flops, unit
from fine_dist.model.arch import MATRICES, arch


def test_a_tensor_of_the_form_is_found_again(generator):
    u, v, s = (torch.randn(n, 12, generator=generator) for n in (40, 24, 6))
    fit = decompose(compose(u, v, s), 12, sweeps=300, generator=generator)
    assert fit.error.max() < 1e-3


@pytest.mark.parametrize("shape", [(6, 40, 24, 12), (8, 192, 64, 64), (4, 64, 256, 48), (2, 40, 40, 20)])
def test_a_stack_that_is_exactly_of_the_form_comes_back_to_float32(shape, generator):
    layers, m, n, rank = shape
    u, v, s = (torch.randn(size, rank, generator=generator) for size in (m, n, layers))
    fit = decompose(compose(u, v, s), rank, generator=generator)
    assert fit.error.max() < 1e-4  # ALS from singular vectors leaves 5 to 10% here after as many sweeps
    # of the layers' own course too: sigma is found up to order and scale, so each true one is a multiple of a found one
    like = unit(s)[0].T @ unit(fit.sigma)[0]
    assert like.abs().amax(1).min() > 0.999


def test_sigma_on_a_line_in_depth_and_too_high_a_rank_come_back_too(generator):
    u, v, ends = (torch.randn(size, 16, generator=generator) for size in (96, 32, 2))
    t = torch.linspace(0, 1, 8)[:, None]
    weights = compose(u, v, (1 - t) * ends[0] + t * ends[1])
    for rank in (16, 24):
        assert decompose(weights, rank, generator=generator).error.max() < 1e-4


def test_the_better_start_is_taken_and_near_the_form_it_is_the_closed_one(generator):
    u, v, s = (torch.randn(size, 16, generator=generator) for size in (64, 32, 6))
    weights = compose(u, v, s)
    weights = weights + 0.03 * weights.std() * torch.randn(weights.shape, generator=generator)
    fit = decompose(weights, 16, sweeps=1, generator=generator)
    closed = jennrich(weights, 16, directions(weights), generator)[0]
    error = measured(weights, *closed, weights.mT @ closed[0])[0]
    assert abs(fit.history[0] - error) < 1e-5
    assert fit.history[-1] < 0.05  # 3% of it is noise


def test_the_tolerance_says_how_long_it_is_polished(generator):
    weights = torch.randn(6, 48, 24, generator=generator)
    rough, fine = (decompose(weights, 24, tolerance=t, generator=generator) for t in (1e-2, 1e-4))
    assert len(rough.history) < len(fine.history) and fine.history[-1] < rough.history[-1]


def test_weights_that_are_not_finite_are_refused():
    weights = torch.ones(3, 8, 8)
    weights[1, 2, 3] = float("nan")
    with pytest.raises(ArtifactError, match="NaN"):
        decompose(weights, 4)


def test_the_error_is_no_worse_than_tensorlys(generator):
    weights = torch.randn(6, 48, 24, generator=generator)
    for rank in (8, 24, 48):
        ours = decompose(weights, rank, sweeps=50, generator=generator).history[-1]
        theirs = tensorly.cp_to_tensor(
            parafac(weights.double().numpy(), rank, n_iter_max=50, init="random", random_state=0, tol=1e-5)
        )
        error = float(np.linalg.norm(theirs - weights.numpy()) / weights.norm())
        assert ours < error + 0.02  # both stop in local optima; 2 points of relative error is that spread


def test_the_reported_error_is_that_of_each_layer(generator):
    weights = torch.randn(5, 20, 12, generator=generator) * torch.tensor([1.0, 2, 3, 4, 5])[:, None, None]
    fit = decompose(weights, 10, generator=generator)
    for layer in range(5):
        rest = weights[layer] - fit.U @ torch.diag(fit.sigma[layer]) @ fit.V.T
        assert abs(float(rest.norm() / weights[layer].norm()) - float(fit.error[layer])) < 1e-5
    assert all(later <= earlier + 1e-6 for earlier, later in zip(fit.history, fit.history[1:]))


def test_more_components_than_rows_fit_better_still(generator):
    weights = torch.randn(4, 16, 16, generator=generator)
    errors = [decompose(weights, rank, generator=generator).history[-1] for rank in (8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05  # 64 = L x 16 components can hold every layer's own SVD


def test_beyond_the_width_it_is_exact_once_there_are_as_many_components_as_singular_values(generator):
    stack = torch.randn(3, 12, 8, generator=generator)
    errors = [float(decompose(stack, rank, sweeps=30, generator=generator).error.max()) for rank in (12, 18, 24)]
    assert errors[0] > errors[1] > 0.01 and errors[2] < 1e-3
    flat = torch.randn(3, 12, 3, generator=generator) @ torch.randn(3, 3, 8, generator=generator)  # layers of rank 3
    assert float(decompose(flat, 9, sweeps=1, generator=generator).error.max()) < 1e-4


def test_an_xl_is_decomposed_in_minutes_on_a_cpu_node_and_in_seconds_on_a_gpu():
    """By count: all sweeps of all five matrices of DiT-XL, R = D. The products are single-precision ones of whole
    matrices, of which a CPU node of 32 cores does 1 TFLOP/s and more, and an H100 40."""
    xl = arch("DiT-XL/2")
    total = sum(50 * sweep_flops(xl.num_layers, *xl.matrix(matrix), xl.hidden_size) for matrix in MATRICES)
    assert total == pytest.approx(154e12, rel=0.01)  # 28 layers of 18 D^2 weights, 4 D FLOPs each, 50 sweeps
    assert total / 1e12 < 10 * 60 and total / 40e12 < 10


def test_a_sweep_costs_what_it_says():
    stack = torch.randn(4, 96, 64, generator=torch.Generator().manual_seed(0))
    counts = []
    for sweeps in (1, 3):
        with FlopCounterMode(display=False) as counter:
            decompose(stack, 16, sweeps=sweeps, tolerance=1e-12)
        counts.append(counter.get_total_flops())
    # beside the two products with the weights: Gram matrices and the products of two thin matrices
    assert 1 <= (counts[1] - counts[0]) / 2 / sweep_flops(4, 96, 64, 16) < 1.35
