"""DiffFit: what trains, what it computes, and that folding changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fine_dist.artifacts.exporting import export
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.errors import ConfigError
from fine_dist.methods.difffit import ScaledDense
from fine_dist.model.arch import arch as named
from fine_dist.model.dit import DiT
from tests.conftest import inputs, tiny_arch
from tests.methods.making import dense, method_of, model_parent, nudge, num_trained, saved_and_read


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
    assert num_trained(descent.model) == biases + 201 * d + layers // 2 * 2 * d
    cost = method_of("difffit").cost(descent.model, 4)
    assert cost.trained == num_trained(descent.model)
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


# --- another resolution ----------------------------------------------------------------------------------------------


def larger(parent, side: int = 16):
    method = method_of("difffit")
    shape = method.shape_of(parent.arch.model_copy(update={"input_size": side}), parent.arch)
    return method, shape, method.descend(parent, shape, torch.Generator().manual_seed(0)).model


def test_positions_of_a_larger_grid_are_rescaled_to_the_range_the_parent_knows(parent):
    _, shape, model = larger(parent)
    small, large = parent.arch.input_size // 2, 8
    assert shape.position_grid == small == 4 and model.pos.shape == (large**2, parent.arch.hidden_size)
    own = parent.module.pos.view(small, small, -1)
    torch.testing.assert_close(model.pos.view(large, large, -1)[::2, ::2], own)  # every second position is an old one
    quarter = parent.arch.hidden_size // 4  # half of the columns' share of the width holds sines
    angle = 0.5 * (1 / 10000 ** (torch.arange(quarter) / quarter))
    torch.testing.assert_close(model.pos.view(large, large, -1)[0, 1, :quarter], angle.sin())


def test_a_flat_image_looks_the_same_at_both_resolutions_but_for_what_depends_on_position(parent):
    """Without positions every patch of a constant image is alike, and attention over more of them changes nothing."""
    _, _, model = larger(parent)
    small = DiT(parent.arch)
    small.load_state_dict(parent.module.state_dict())
    model.pos.zero_()
    small.pos.zero_()
    t, y = torch.tensor([10, 500]), torch.tensor([0, 3])
    one = small(torch.full((2, 1, 8, 8), 0.3), t, y)
    other = model(torch.full((2, 1, 16, 16), 0.3), t, y)
    torch.testing.assert_close(other[:, :, :2, :2], one[:, :, :2, :2], atol=1e-5, rtol=1e-5)


def test_a_larger_target_trains_merges_and_comes_back(parent, tmp_path):
    method, shape, model = larger(parent)
    batch = inputs(shape)
    model(*batch).square().mean().backward()
    assert num_trained(model) == num_trained(target(parent)[1])
    nudge(model)
    back, _ = saved_and_read(tmp_path / "t", method, model, parent)
    with torch.no_grad():
        assert torch.equal(back(*batch), model(*batch))
    merged = DiT(shape)
    merged.load_state_dict(method.merge(model))
    with torch.no_grad():
        torch.testing.assert_close(merged(*batch), model(*batch), atol=0, rtol=0)
    assert torch.equal(merged.pos, model.pos)


def test_other_methods_keep_the_resolution(parent):
    from fine_dist.core.errors import ArtifactError
    from fine_dist.methods import check

    with pytest.raises(ArtifactError, match=r"input_size is 8 in the parent, 16 in the target.*could: .*difffit"):
        check(method_of("svdiff"), parent.artifact, parent.arch.model_copy(update={"input_size": 16}))


def test_a_layout_without_a_position_table_refuses_rescaled_positions_and_dits_own_brings_them_back(parent, tmp_path):
    method, shape, model = larger(parent)
    nudge(model)
    merged = DiT(shape)
    merged.load_state_dict(method.merge(model))
    about = {"kind": "model", "hash": "0", "method": {"name": "difffit"}, "folder": "model"}
    with pytest.raises(ConfigError, match=r"positions are rescaled to a grid of 4 patches.*legal here: DiT's layout"):
        export(merged, about, "diffusers", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    export(merged, about, "dit", tmp_path / "model.pt")
    back, _ = load_model(tmp_path / "model.pt", hints=HintsConfig(num_heads=shape.num_heads))
    assert back.arch == shape
    batch = inputs(shape)
    with torch.no_grad():
        torch.testing.assert_close(back(*batch), model(*batch), atol=0, rtol=0)
