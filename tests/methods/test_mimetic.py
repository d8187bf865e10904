"""Mimetic initialization against the matrices that it draws from, computed in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_dist.methods import METHODS, build
from fine_dist.methods.mimetic import factor
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


def test_queries_and_keys_of_a_head_are_the_best_approximation_that_its_size_allows(generator):
    wanted = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    left, right = factor(wanted, 8)
    u, s, vt = np.linalg.svd(wanted.numpy())
    best = sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(8))
    np.testing.assert_allclose((left @ right.T).numpy(), best, atol=1e-10)
    np.testing.assert_allclose(left.norm(dim=0), right.norm(dim=0), rtol=1e-9)  # sqrt(S) on both sides
    heads = list(products(made(arch=tiny_arch(num_layers=1))))
    assert len(heads) == 4 and all(np.diag(qk).mean() > 0.1 for qk, _ in heads)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_the_heads_values_and_projections_add_up_to_the_wanted_diagonal(heads):
    arch = tiny_arch(num_layers=3, num_heads=heads, hidden_size=64)
    found = list(products(made(arch=arch)))
    for layer in range(3):
        total = sum(vo for _, vo in found[layer * heads : (layer + 1) * heads])
        # the mean of 64 diagonal entries of 0.4 Z has deviation 0.4 / 64; an SVD for each head would give -0.75
        assert np.diag(total).mean() == pytest.approx(-0.40, abs=4 * 0.4 / 64)
        assert total[~np.eye(64, dtype=bool)].std() == pytest.approx(0.4 / 8, rel=0.06)


def test_no_noise_and_full_heads_give_the_identity_itself():
    arch = tiny_arch(num_layers=1, num_heads=1)
    [(qk, vo)] = products(made(arch=arch, alpha_qk=0, alpha_vo=0))
    np.testing.assert_allclose(qk, 0.7 * np.eye(32), atol=1e-6)
    np.testing.assert_allclose(vo, -0.4 * np.eye(32), atol=1e-6)


def test_what_is_not_attention_is_dits_own_initialization():
    model, other = made(seed=0), made(seed=1)
    for block in model.blocks:
        bound = (6 / (32 + 128)) ** 0.5  # Xavier's
        assert float(block.get_submodule("in").weight.detach().abs().max()) <= bound
        assert not block.get_submodule("adaln").weight.any() and not block.get_submodule("qkv").bias.any()
    assert not torch.equal(model.blocks[0].o.weight, other.blocks[0].o.weight)
