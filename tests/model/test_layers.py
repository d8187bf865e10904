"""A block's operations against their formulas, and the factored product's backward pass against autograd's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fine_dist.model.layers import FactoredProduct, attention, gated_add, modulate

JOBS, ROWS, M, N, RANK = 3, 20, 12, 8, 10


def drawer(generator, dtype=torch.float64):
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("given", ["x", "x V"])
@pytest.mark.parametrize("jobs", [1, JOBS])
def test_the_factored_product_has_the_gradients_of_its_formula(given, jobs, generator):
    draw = drawer(generator)
    v = draw(N, RANK) if given == "x" else None
    x = draw(jobs, ROWS, N if given == "x" else RANK).requires_grad_()
    sigma, bias, u, g = draw(jobs, RANK).requires_grad_(), draw(jobs, M), draw(M, RANK), draw(jobs, ROWS, M)
    ours = FactoredProduct.apply(x, sigma, bias, u, v, torch.float64)
    naive = ((x if v is None else x @ v) * sigma[:, None]) @ u.T + bias[:, None]
    torch.testing.assert_close(ours, naive)
    for a, b in zip(torch.autograd.grad(ours, (x, sigma), g), torch.autograd.grad(naive, (x, sigma), g)):
        # sigma's gradient is summed in fp32, as packs train it
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_factored_product_keeps_one_thin_tensor_and_no_gradient_of_factors(generator):
    """Autograd keeps the thin product before and after sigma; this one keeps it once, and U and V get no gradient."""
    draw = drawer(generator, torch.float32)
    x, sigma, u, v = draw(JOBS, ROWS, N), draw(JOBS, RANK).requires_grad_(), draw(M, RANK), draw(N, RANK)
    bias = draw(JOBS, M)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        y = FactoredProduct.apply(x, sigma, bias, u, v, torch.float32)
    assert kept.count((JOBS, ROWS, RANK)) == 1 and (JOBS, ROWS, N) not in kept
    y.sum().backward()
    assert sigma.grad is not None and x.grad is u.grad is v.grad is bias.grad is None


def test_modulation_gate_and_attention_are_their_formulas(generator):
    draw = drawer(generator, torch.float64)
    x, y = draw(3, 16, 12), draw(3, 16, 12)
    shift, scale = draw(3, 1, 12), draw(3, 1, 12)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modulate(x, shift, scale), normed * (1 + scale) + shift)
    torch.testing.assert_close(gated_add(x, scale, y), x + scale * y)
    qkv = draw(2, 6, 3 * 8)
    q, k, v = (part.reshape(2, 6, 2, 4) for part in qkv.split(8, dim=2))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
    naive = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(2, 6, 8)
    torch.testing.assert_close(attention(qkv, 2), naive)


def test_under_autocast_the_residual_stays_fp32(generator):
    draw = drawer(generator, torch.float32)
    x, y, scale = draw(2, 256, 96).requires_grad_(), draw(2, 256, 96).bfloat16().requires_grad_(), draw(2, 1, 96)
    with torch.autocast("cpu", torch.bfloat16):
        h, out = modulate(x, scale.bfloat16(), scale.bfloat16()), gated_add(x, scale.bfloat16(), y)
    assert out.dtype == torch.float32
    half = scale.bfloat16().float()
    torch.testing.assert_close(h.float(), F.layer_norm(x, [96], eps=1e-6) * (1 + half) + half, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out, x + half * y.float())
