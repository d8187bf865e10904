"""DiffFit: what trains, what it computes, and that folding changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fine_dist.methods.difffit import ScaledDense
from fine_dist.model.arch import arch as named
from fine_dist.model.dit import DiT
from tests.conftest import inputs, tiny_arch
from tests.methods.tools import dense, method_of, model_parent, nudge, saved_and_read, trained


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return model_parent(tmp_path_factory.mktemp("parent") / "model")


def target(parent, **settings):
    method = method_of("difffit", **settings)
    return method, method.descend(parent, parent.arch, torch.Generator().manual_seed(0)).model


def test_it_begins_as_its_parent_and_scales_the_first_half_of_the_blocks(parent):
    method, model = target(parent)
    batch = inputs(model.arch)
    torch.testing.assert_close(model(*batch), parent.module(*batch), atol=0, rtol=0)  # every gamma is one
    scaled = [name for name, module in model.named_modules() if isinstance(module, ScaledDense)]
    assert scaled == ["blocks.0.o", "blocks.0.out", "blocks.1.o", "blocks.1.out"]
    everywhere = method.vary("scaled", "all").module(model.arch, {})
    assert sum(isinstance(m, ScaledDense) for m in everywhere.modules()) == 8


def test_only_biases_labels_and_scales_train_and_no_weight_gradient_exists(parent):
    _, model = target(parent)
    model(*inputs(model.arch)).square().mean().backward()
    for name, p in model.named_parameters():
        wanted = name.endswith((".bias", ".gamma")) or name == "label.weight"
        wanted = wanted and not name.startswith("time.")
        assert p.requires_grad == wanted and (p.grad is not None) == wanted, name


def test_a_scaled_matrix_multiplies_its_branch_row_by_row(generator):
    matrix = ScaledDense(3, 2)
    with torch.no_grad():
        for p in matrix.parameters():
            p.normal_(generator=generator)
    x = torch.randn(4, 3, generator=generator)
    for i in range(4):
        for row in range(2):
            product = sum(matrix.weight[row, j] * x[i, j] for j in range(3)) + matrix.bias[row]
            torch.testing.assert_close(matrix(x)[i, row], matrix.gamma[row] * product)


def test_folded_equals_unfolded_bit_for_bit_in_fp64(parent):
    method, model = target(parent)
    nudge(model)
    model.double()
    merged = DiT(model.arch).double()
    merged.load_state_dict(method.merge(model))
    z, t, y = inputs(model.arch)
    with torch.no_grad():  # as it is evaluated and sampled
        assert torch.equal(model(z.double(), t, y), merged(z.double(), t, y))
    # as it trains gamma multiplies last, which rounds differently: a few units of fp64's 1e-16
    torch.testing.assert_close(model(z.double(), t, y), merged(z.double(), t, y), atol=1e-12, rtol=1e-12)
    # gammas that are powers of two round nowhere, so both orders of multiplying give the same bits
    matrix = next(m for m in model.modules() if isinstance(m, ScaledDense))
    with torch.no_grad():
        matrix.gamma.copy_(2.0 ** torch.randint(-3, 4, matrix.gamma.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(matrix(x), F.linear(x, *matrix.folded()))


def test_merged_agrees_in_fp32_and_only_what_trained_is_stored(parent, tmp_path):
    method, model = target(parent)
    nudge(model)
    batch = inputs(model.arch)
    torch.testing.assert_close(dense(method, model)(*batch), model(*batch), atol=1e-5, rtol=1e-5)
    back, inherited = saved_and_read(tmp_path / "t", method, model, parent)
    assert torch.equal(back(*batch), model(*batch))
    assert set(model.state_dict()) - set(inherited) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["DiT-B/2", "DiT-L/2", "DiT-XL/2"])
def test_counts_are_the_formulas(name):
    shape = named(name, num_classes=200)
    d, layers = shape.hidden_size, shape.num_layers
    with torch.device("meta"):
        model = method_of("difffit").module(shape, {})
        parent_numbers = DiT(shape)
        descent = method_of("difffit").descend(_standing_for(parent_numbers), shape, torch.Generator())
    assert sum(p.numel() for p in model.parameters()) == shape.count() + layers // 2 * 2 * d
    biases = 15 * d * layers + 3 * d + 4 * shape.out_channels
    assert trained(descent.model) == biases + 201 * d + layers // 2 * 2 * d
    cost = method_of("difffit").cost(descent.model, 4)
    assert cost.trained == trained(descent.model)
    assert cost.training < 0.7 * method_of("scratch").cost(parent_numbers, 4).training  # no gradients of weights
    if name == "DiT-XL/2":  # the paper's "0.12%" of 675M lies at about 250 classes; 200 give 0.11%
        assert cost.trained / named("DiT-XL/2").count() == pytest.approx(0.0012, abs=0.0002)


def _standing_for(model):
    class Standing:
        module = model

    return Standing()


def test_a_parent_of_another_size_is_refused(parent):
    from fine_dist.core.errors import ArtifactError
    from fine_dist.methods import check

    with pytest.raises(ArtifactError, match="num_layers is 4 in the parent, 2 in the target"):
        check(method_of("difffit"), parent.artifact, tiny_arch(num_layers=2))
