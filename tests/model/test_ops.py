"""The hand-written backward passes against autograd's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fine_dist.model import ops, sweeps
from fine_dist.model.attention import Attention, attention
from fine_dist.model.ops import ComposedProduct, FactoredProduct, Linear, column_sums, gelu, linear
from fine_dist.model.sweeps import GatedAdd, Modulate, gated_add, modulate

JOBS, ROWS, M, N, RANK = 3, 20, 12, 8, 10


def drawer(generator, dtype=torch.float64):
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)


def assert_alike(ours, plain, inputs, g, **tolerance):
    """Two results and their gradients of the same inputs."""
    torch.testing.assert_close(ours, plain, **tolerance)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(plain, inputs, g)):
        torch.testing.assert_close(a, b, **tolerance)


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


def test_every_backward_pass_is_the_derivative_of_its_forward_pass(generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    double = torch.float64
    x, one, other = draw(2, 3, 4), draw(2, 1, 4), draw(2, 1, 4)
    u, sigma, v = draw(5, 3), draw(3), draw(4, 3)
    assert torch.autograd.gradcheck(lambda *given: Modulate.apply(*given, double), (x, one, other))
    assert torch.autograd.gradcheck(GatedAdd.apply, (x, one, draw(2, 3, 4)))
    assert torch.autograd.gradcheck(lambda *given: Linear.apply(*given, double), (x, draw(5, 4), draw(5)))
    assert torch.autograd.gradcheck(lambda *given: ComposedProduct.apply(*given, double), (x, u, sigma, v, draw(5)))


def test_parts_that_do_not_train_get_no_gradient(generator):
    draw = drawer(generator)
    x, u, sigma, v = draw(2, 3, 4), draw(5, 3), draw(3).requires_grad_(), draw(4, 3)
    ComposedProduct.apply(x, u, sigma, v, None, torch.float64).sum().backward()
    want = torch.autograd.functional.jacobian(lambda s: (x @ ((u * s) @ v.T).T).sum(), sigma.detach())
    torch.testing.assert_close(sigma.grad, want)
    assert x.grad is u.grad is v.grad is None


@pytest.mark.parametrize("shape", [(3, 256, 96), (3, 4, 8)], ids=["sample by sample", "at once"])
def test_modulation_and_gate_are_their_formulas_with_their_gradients(shape, generator):
    draw = drawer(generator, torch.float32)
    x, y, g = draw(*shape).requires_grad_(), draw(*shape).requires_grad_(), draw(*shape)
    shift, scale = draw(shape[0], 1, shape[2]).requires_grad_(), draw(shape[0], 1, shape[2]).requires_grad_()
    # float32 sums over 256 tokens in another order
    plain = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    assert_alike(modulate(x, shift, scale), plain, (x, shift, scale), g, atol=1e-4, rtol=1e-5)
    assert_alike(gated_add(x, scale, y), x + scale * y, (x, scale, y), g, atol=1e-4, rtol=1e-5)


def test_under_autocast_modulation_gives_bf16_and_the_residual_stays_fp32(generator):
    draw = drawer(generator, torch.float32)
    assert sweeps.SAMPLE_FROM <= 256 * 96
    x, y, scale = draw(2, 256, 96).requires_grad_(), draw(2, 256, 96).bfloat16().requires_grad_(), draw(2, 1, 96)
    with torch.autocast("cpu", torch.bfloat16):
        h, out = modulate(x, scale.bfloat16(), scale.bfloat16()), gated_add(x, scale.bfloat16(), y)
    assert (h.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    (h.float().sum() + out.sum()).backward()
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, torch.bfloat16)
    half = scale.bfloat16().float()
    torch.testing.assert_close(h.float(), F.layer_norm(x, [96], eps=1e-6) * (1 + half) + half, atol=1e-6, rtol=2**-8)
    torch.testing.assert_close(out, x + half * y.float())


def test_a_large_product_is_torchs_linear_with_its_gradients(generator):
    draw = drawer(generator, torch.float32)
    x, w, b = draw(2, 256, 96).requires_grad_(), draw(96, 96).requires_grad_(), draw(96).requires_grad_()
    g = draw(2, 256, 96)
    assert x.numel() * len(w) >= ops.ONEDNN_FROM
    # float32 sums of 96 and 512 terms in another order
    assert_alike(linear(x, w, b), F.linear(x, w, b), (x, w, b), g, atol=2e-4, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half, plain = linear(x, w, b), F.linear(x, w, b)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, plain, atol=0.15, rtol=2**-7)  # one rounding to 8 bits of sums of size 10
    grads = torch.autograd.grad(half, (x, w, b), g.bfloat16())
    assert {a.dtype for a in grads} == {torch.float32}


def test_attention_in_bf16_is_as_near_to_fp32_as_torchs_own(generator):
    draw = drawer(generator, torch.float32)
    qkv, g = draw(2, 64, 3 * 32), draw(2, 64, 32)

    def ask(attend, dtype):
        given = qkv.to(dtype).requires_grad_()
        out = attend(given, 4)
        return out.detach().float(), torch.autograd.grad(out, given, g.to(dtype))[0].float()

    def torchs(x, heads):
        q, k, v = x.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    exact = ask(torchs, torch.float32)
    for ours, want in zip(ask(Attention.apply, torch.float32), exact):
        torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)  # another order of sums
    for ours, theirs, want in zip(ask(attention, torch.bfloat16), ask(torchs, torch.bfloat16), exact):
        assert float((ours - want).norm()) < 1.5 * float((theirs - want).norm())
    with torch.no_grad():
        torch.testing.assert_close(attention(qkv, 4), exact[0], atol=1e-5, rtol=1e-5)


def test_the_packs_gelu_is_torchs_with_its_gradient(generator):
    x = torch.cat([torch.randn(5000, generator=generator) * 4, torch.tensor([0.0, -30.0, 30.0])]).requires_grad_()
    ours, torchs = gelu(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, torchs, atol=2e-6, rtol=1e-6)  # two formulas of one function, in fp32
    for a, b in zip(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(torchs.sum(), x)):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_sums_over_rows_are_those_of_fp64(generator):
    # fp32: sums of 700 numbers; bf16: summed in fp32 all the same, and rounded once, by 2^-9 of the result
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        g = torch.randn(700, 12, generator=generator).to(dtype)
        torch.testing.assert_close(column_sums(g, torch.float32).double(), g.double().sum(0), atol=2e-5, rtol=rtol)
