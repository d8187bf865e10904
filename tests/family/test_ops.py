"""The block of a pack, its backward passes written by hand, against autograd's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fine_dist.family.pack_ops import SHORT, Frozen, GatedProduct, ModulatedProduct, ShortAttention
from fine_dist.model.dit import attention

JOBS, BATCH, TOKENS, WIDTH, OUT, RANK = 2, 3, 4, 8, 12, 6


@pytest.fixture
def draw(generator):
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def matrix(draw, m: int, n: int, composed: bool) -> Frozen:
    return Frozen(draw(m, RANK), draw(n, RANK), draw(JOBS, m), composed)


def product(h, sigma, frozen):
    """The formula, a job at a time."""
    made = [u_sigma @ frozen.v.T for u_sigma in (frozen.u * row for row in sigma)]
    rows = h.view(JOBS, -1, h.shape[-1])
    y = torch.stack([rows[j] @ made[j].T + frozen.bias[j] for j in range(JOBS)])
    return y.view(*h.shape[:-1], -1)


def assert_same(ours, naive, inputs, draw):
    torch.testing.assert_close(ours, naive)
    g = draw(*naive.shape)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(naive, inputs, g), strict=True):
        torch.testing.assert_close(a, b)  # both in fp64: what differs is the order of sums


@pytest.mark.parametrize("composed", [True, False])
def test_a_modulated_product_is_its_formula_with_its_gradients(draw, composed):
    frozen = matrix(draw, OUT, WIDTH, composed)
    n = JOBS * BATCH
    inputs = [x.requires_grad_() for x in (draw(n, TOKENS, WIDTH), draw(n, 1, WIDTH), draw(n, 1, WIDTH))]
    inputs.append(draw(JOBS, RANK).requires_grad_())
    x, shift, scale, sigma = inputs
    h = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    assert_same(ModulatedProduct.apply(x, shift, scale, sigma, frozen), product(h, sigma, frozen), inputs, draw)


@pytest.mark.parametrize("composed", [True, False])
def test_a_gated_product_is_its_formula_with_its_gradients(draw, composed):
    frozen = matrix(draw, WIDTH, OUT, composed)
    n = JOBS * BATCH
    inputs = [x.requires_grad_() for x in (draw(n, TOKENS, WIDTH), draw(n, TOKENS, OUT), draw(n, 1, WIDTH))]
    inputs.append(draw(JOBS, RANK).requires_grad_())
    x, h, gate, sigma = inputs
    ours = GatedProduct.apply(x, h, gate, sigma, frozen)
    assert_same(ours, x + gate * product(h, sigma, frozen), inputs, draw)


@pytest.mark.parametrize("tokens", [1, 5, SHORT])
def test_short_attention_is_torchs(draw, tokens):
    qkv = draw(3, tokens, 3 * WIDTH).requires_grad_()
    assert_same(ShortAttention.apply(qkv, 2), attention(qkv, 2), [qkv], draw)


@pytest.mark.parametrize("composed", [True, False])
def test_products_of_bf16_keep_sigmas_gradient_in_fp32(draw, composed):
    exact = matrix(draw, OUT, WIDTH, composed)
    frozen = Frozen(exact.u.bfloat16(), exact.v.bfloat16(), exact.bias.float(), composed)
    n = JOBS * BATCH
    x, shift, scale, sigma = (
        each.float().requires_grad_() for each in (draw(n, TOKENS, WIDTH), draw(n, 1, WIDTH), draw(n, 1, WIDTH),
                                                   draw(JOBS, RANK))
    )  # fmt: skip
    y = ModulatedProduct.apply(x, shift, scale, sigma, frozen)
    h = F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift
    reference = Frozen(frozen.u.float(), frozen.v.float(), frozen.bias, composed)
    naive = product(h, sigma, reference)
    assert y.dtype == torch.bfloat16
    g = draw(*y.shape).float()
    ours = torch.autograd.grad(y, (x, sigma), g.bfloat16())
    theirs = torch.autograd.grad(naive, (x, sigma), g)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        # 8 bits a factor, three factors: some parts in a hundred of the largest entry
        assert float((a - b).abs().max() / b.abs().max()) < 0.03
