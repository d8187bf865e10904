"""The hand-written backward passes against autograd's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fine_dist.model.ops import FactoredProduct, gelu

JOBS, ROWS, M, N, RANK = 3, 20, 12, 8, 10


@pytest.mark.parametrize("given", ["x", "x V"])
def test_the_factored_product_has_the_gradients_of_its_formula(given, generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    v = draw(N, RANK) if given == "x" else None
    x = draw(JOBS, ROWS, N if given == "x" else RANK).requires_grad_()
    sigma, bias, u, g = draw(JOBS, RANK).requires_grad_(), draw(JOBS, M), draw(M, RANK), draw(JOBS, ROWS, M)
    ours = FactoredProduct.apply(x, sigma, bias, u, v, torch.float64)
    naive = ((x if v is None else x @ v) * sigma[:, None]) @ u.T + bias[:, None]
    torch.testing.assert_close(ours, naive)
    for a, b in zip(torch.autograd.grad(ours, (x, sigma), g), torch.autograd.grad(naive, (x, sigma), g)):
        # sigma's gradient is summed in fp32, as packs train it
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_packs_gelu_is_torchs_with_its_gradient(generator):
    x = torch.cat([torch.randn(5000, generator=generator) * 4, torch.tensor([0.0, -30.0, 30.0])]).requires_grad_()
    ours, torchs = gelu(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, torchs, atol=2e-6, rtol=1e-6)  # two formulas of one function, in fp32
    for a, b in zip(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(torchs.sum(), x)):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
