"""SVDiff against numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_dist.methods.svdiff import SpectralDense
from fine_dist.model.arch import MATRICES
from fine_dist.model.arch import arch as named
from tests.conftest import inputs
from tests.methods.making import dense, method_of, model_parent, nudge, num_trained, saved_and_read


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return model_parent(tmp_path_factory.mktemp("parent") / "model", num_layers=2)


@pytest.fixture
def target(parent):
    method = method_of("svdiff")
    return method, method.descend(parent, parent.arch, torch.Generator().manual_seed(0)).model


def test_it_begins_as_its_parent(parent, target):
    batch = inputs(parent.arch)
    torch.testing.assert_close(target[1](*batch), parent.module(*batch), atol=2e-5, rtol=1e-5)  # fp32 factors


def test_singular_values_are_numpys_shifted_and_never_below_zero(parent, target):
    method, model = target
    weight = parent.module.blocks[1].out.weight.detach().numpy().astype(np.float64)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    own = model.blocks[1].out
    delta = torch.linspace(-2 * float(s[0]), 1, 32)
    with torch.no_grad():
        own.delta.copy_(delta)
    expected = u @ np.diag(np.maximum(s + delta.numpy(), 0)) @ vt
    assert (s + delta.numpy() < 0).any()
    np.testing.assert_allclose(method.merge(model)["blocks.1.out.weight"].numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(method.tables(model)["out"][1], delta)


def test_only_the_shifts_train_and_merging_keeps_the_function(target):
    method, model = target
    may = {name for name, p in model.named_parameters() if p.requires_grad}
    assert may == {f"blocks.{layer}.{matrix}.delta" for layer in range(2) for matrix in MATRICES}
    nudge(model)
    batch = inputs(model.arch)
    torch.testing.assert_close(dense(method, model)(*batch), model(*batch), atol=1e-5, rtol=1e-5)
    model(*batch).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_both_paths_give_the_same_numbers_and_the_cheaper_is_taken(generator):
    matrix = SpectralDense(8, 24)
    matrix.decompose(torch.randn(24, 8, generator=generator), torch.zeros(24))
    x = torch.randn(2, 8, generator=generator)
    assert {rows: matrix.choose(rows, True) for rows in (1, 4096)} == {1: "factored", 4096: "factored"}
    assert matrix.choose(4096, False) == "composed"  # made once, used for many rows
    with torch.no_grad():
        many = x.repeat(2048, 1)
        torch.testing.assert_close(matrix(many)[:2], matrix(x), atol=1e-5, rtol=1e-5)


def test_a_target_comes_back_whole_and_counts_are_the_formulas(parent, target, tmp_path):
    method, model = target
    nudge(model)
    back, inherited = saved_and_read(tmp_path / "t", method, model, parent)
    batch = inputs(model.arch)
    assert torch.equal(back(*batch), model(*batch)) and "patch.weight" in inherited
    shape = named("DiT-B/2")
    with torch.device("meta"):
        big = method.module(shape, {})
    d, layers = shape.hidden_size, shape.num_layers
    # U and V of the five matrices: (3 + 1) + (1 + 1) + (4 + 1) + (1 + 4) + (6 + 1) D^2; S and delta: 2 x 5 D
    extra = layers * ((23 - 18) * d * d + 10 * d)
    assert sum(p.numel() for p in big.parameters()) == shape.count() + extra
    assert num_trained(model) == 2 * 5 * 32
