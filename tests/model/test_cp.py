"""The decomposition against TensorLy's, and on tensors whose answer is known."""

from __future__ import annotations

import numpy as np
import tensorly
import torch
from tensorly.decomposition import parafac

from fine_dist.model.cp import compose, decompose


def test_a_tensor_of_the_form_is_found_again(generator):
    u, v, s = (torch.randn(n, 12, generator=generator) for n in (40, 24, 6))
    fit = decompose(compose(u, v, s), 12, sweeps=300, generator=generator)
    assert fit.error.max() < 1e-3


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
