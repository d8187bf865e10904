"""Mimetic initialisation against the matrices that it draws from, computed head by head in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_dist.methods import METHODS, build
from tests.conftest import tiny_arch


def made(seed=0, arch=None, **settings):
    method = build(METHODS["mimetic"].Config(name="mimetic", **settings))
    return method.descend(None, arch or tiny_arch(), torch.Generator().manual_seed(seed)).model


def products(model):
    """Every head's W_q^T W_k and W_o W_v, [D, D] each."""
    arch = model.arch
    size = arch.hidden_size // arch.num_heads
    for block in model.blocks:
        qkv, o = block.get_submodule("qkv").weight.detach().numpy(), block.get_submodule("o").weight.detach().numpy()
        for head in range(arch.num_heads):
            own = range(head * size, (head + 1) * size)
            q, k, v = (np.stack([qkv[third * arch.hidden_size + i] for i in own]) for third in range(3))
            yield q.T @ k, o[:, own] @ v


def test_with_one_head_the_products_are_noise_and_the_identity_on_the_diagonal():
    # A single head of size D cuts nothing, so the drawn matrix comes back whole: 0.7 Z + 0.7 I and 0.4 Z - 0.4 I.
    arch = tiny_arch(num_layers=2, num_heads=1, hidden_size=64)
    for qk, vo in products(made(arch=arch)):
        off = ~np.eye(64, dtype=bool)
        # 64 entries of deviation 0.7 / 8 (0.4 / 8): their mean is within 4 deviations, 0.7 / 16 (0.4 / 16), of beta
        assert np.diag(qk).mean() == pytest.approx(0.7, abs=0.045)
        assert np.diag(vo).mean() == pytest.approx(-0.4, abs=0.025)
        assert qk[off].std() == pytest.approx(0.7 / 8, rel=0.06) and abs(qk[off].mean()) < 0.01
        assert vo[off].std() == pytest.approx(0.4 / 8, rel=0.06)


def test_each_head_is_the_best_approximation_that_its_size_allows():
    arch = tiny_arch(num_layers=1)
    method = build(METHODS["mimetic"].Config(name="mimetic"))
    q, k, v, o = method.head(32, 8, torch.Generator().manual_seed(3))
    noise = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy() / 32**0.5
    for got, want in (((q.T @ k), 0.7 * noise[0] + 0.7 * np.eye(32)), ((o @ v), 0.4 * noise[1] - 0.4 * np.eye(32))):
        u, s, vt = np.linalg.svd(want)
        best = sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(8))
        np.testing.assert_allclose(got.numpy(), best, atol=2e-6)  # fp32 factors
    np.testing.assert_allclose(q.norm(dim=1), k.norm(dim=1), rtol=1e-5)  # sqrt(S) on both sides
    heads = list(products(made(arch=arch)))
    assert len(heads) == 4 and all(np.diag(qk).mean() > 0.1 and np.diag(vo).mean() < -0.05 for qk, vo in heads)


def test_no_noise_and_full_heads_give_the_identity_itself():
    arch = tiny_arch(num_layers=1, num_heads=1)
    [(qk, vo)] = products(made(arch=arch, alpha_qk=0, alpha_vo=0))
    np.testing.assert_allclose(qk, 0.7 * np.eye(32), atol=1e-6)
    np.testing.assert_allclose(vo, -0.4 * np.eye(32), atol=1e-6)


def test_what_is_not_attention_is_dits_own_initialisation():
    model, other = made(seed=0), made(seed=1)
    for block in model.blocks:
        bound = (6 / (32 + 128)) ** 0.5  # Xavier's
        assert float(block.get_submodule("in").weight.detach().abs().max()) <= bound
        assert not block.get_submodule("adaln").weight.any() and not block.get_submodule("qkv").bias.any()
    assert not torch.equal(model.blocks[0].o.weight, other.blocks[0].o.weight)
