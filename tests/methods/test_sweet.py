"""SWEET: the Tucker form against loops, targets of other depths and widths, and what is random while it trains."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ArtifactError
from fine_dist.methods import build
from fine_dist.methods.settings import SweetConfig
from fine_dist.methods.shared import dense_state
from fine_dist.model.arch import MATRICES, arch
from fine_dist.model.roles import roles
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import artifact_for, condensed, parent_for, tiny

SLABS = {"qkv": 3, "o": 1, "in": 4, "out": 4, "adaln": 6}


def test_a_slab_is_the_core_multiplied_by_all_three_scalers_entry_by_entry():
    _, model = condensed(tiny("sweet", components=3, side=5), tiny_arch(hidden_size=8, num_heads=2))
    lively(model)
    core, u, v = model.template.G, model.template.U, model.template.V
    for matrix, slabs in SLABS.items():
        layer = model.blocks[1].get_submodule(matrix)
        weight, _ = layer.dense()
        assert layer.X.shape == (slabs, 3) and tuple(weight.shape) == model.arch.matrix(matrix)
        for slab in range(slabs):
            tile = weight[:, 8 * slab : 8 * slab + 8] if matrix == "out" else weight[8 * slab : 8 * slab + 8]
            for i, j in ((0, 0), (3, 7), (7, 2)):
                expected = sum(
                    layer.X[slab, a] * core[a, b, c] * u[i, b] * v[j, c]
                    for a in range(3)
                    for b in range(5)
                    for c in range(5)
                )
                torch.testing.assert_close(tile[i, j], expected, atol=1e-5, rtol=1e-5)


def test_as_many_components_as_slabs_can_make_any_model(generator):
    """With U and V the identity the core holds the slabs themselves."""
    _, model = condensed(tiny("sweet", components=36), tiny_arch(num_layers=2))
    wanted = {m: torch.randn(2, *model.arch.matrix(m), generator=generator) for m in MATRICES}
    with torch.no_grad():
        model.template.U.copy_(torch.eye(32))
        model.template.V.copy_(torch.eye(32))
        place = 0
        for layer in range(2):
            for matrix, slabs in SLABS.items():
                tiles = wanted[matrix][layer].chunk(slabs, dim=1 if matrix == "out" else 0)
                own = model.blocks[layer].get_submodule(matrix)
                own.X.zero_()
                for slab, tile in enumerate(tiles):
                    model.template.G[place] = tile
                    own.X[slab, place] = 1
                    place += 1
        for matrix in MATRICES:
            for layer in range(2):
                got, _ = model.blocks[layer].get_submodule(matrix).dense()
                torch.testing.assert_close(got, wanted[matrix][layer])


def test_weights_start_with_xaviers_variance_and_blocks_as_the_identity():
    _, model = condensed(tiny("sweet", components=24), tiny_arch(hidden_size=64, num_heads=4))
    for matrix in ("qkv", "o", "in", "out"):
        m, n = model.arch.matrix(matrix)
        for block in model.blocks:
            weight, _ = block.get_submodule(matrix).dense()
            assert float(weight.detach().var()) == pytest.approx(2 / (m + n), rel=0.5), matrix
    assert not any(block.get_submodule("adaln").dense()[0].any() for block in model.blocks)


@pytest.mark.parametrize("fields", [{"num_layers": 6}, {"num_layers": 2, "hidden_size": 64, "num_heads": 8}])
def test_a_target_keeps_the_core_and_trains_the_scalers_of_its_own_size(fields, generator):
    shape = tiny_arch(**fields)
    descent = tiny("sweet").descend(parent_for("sweet"), shape, generator)
    model, known = descent.model, roles(descent.model)
    assert descent.trains == "some"
    assert {known[name] for name, p in model.named_parameters() if p.requires_grad} == {"scaler"}
    assert torch.equal(model.template.G, artifact_for("sweet").tensors["template.G"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == shape.num_layers * 18 * 6 + 2 * shape.hidden_size * 32


def test_at_twice_the_width_the_function_is_the_parents_but_for_the_position_table(generator):
    parent = parent_for("sweet")
    lively(parent.module, seed=5, std=0.3)
    shape = tiny_arch(hidden_size=64, num_heads=8)
    wide = tiny("sweet", scalers="linear").descend(parent, shape, generator).model
    index = torch.arange(64) // 16 * 8 + torch.arange(64) % 8  # heads of 8: 0, 0, 1, 1, ...
    wide.pos.copy_(parent.module.pos[:, index])
    z, t, y = inputs(shape)
    for model in (wide, parent.module):
        model.double()  # weights are large here, and sums of another length differ in fp32
    torch.testing.assert_close(wide(z.double(), t, y), parent.module(z.double(), t, y), atol=1e-6, rtol=1e-6)


def test_while_training_the_core_is_scaled_at_random_and_measured_as_it_is():
    condensation, model = condensed(tiny("sweet", scaling=0.25))
    lively(model)
    batch = inputs(model.arch)
    plain = model(*batch).detach()
    condensation.before_step(0, torch.Generator().manual_seed(0))
    scales = torch.cat([model.template.scale_u, model.template.scale_v])
    assert 0.75 <= float(scales.min()) < 0.8 and 1.2 < float(scales.max()) <= 1.25
    u = model.template.U.detach() * model.template.scale_u
    layer = model.blocks[0].get_submodule("o")
    mixed = torch.einsum("r,rab->ab", layer.X[0], model.template.G)
    expected = u @ mixed @ (model.template.V * model.template.scale_v).T
    torch.testing.assert_close(layer.dense()[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(*batch), plain)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch), plain)
    assert "template.scale_u" not in model.state_dict()  # nor is it in the learngene
    assert condensed(tiny("sweet", scaling=0))[0].before_step is None


def test_the_default_stores_about_what_shared_factors_of_rank_d_do():
    shape = arch("DiT-B/2")
    with torch.device("meta"):
        module = build(SweetConfig()).blueprint(shape)
    d = shape.hidden_size
    core = sum(p.numel() for name, p in module.named_parameters() if name == "template.G")
    assert core == 24 * d * d and core / (23 * d * d) < 1.05  # 23: sum of m + n over the five matrices, in D
    outside = shape.with_depth(1).count() - (18 * d * d + 15 * d)
    stored = build(SweetConfig()).cost(module).stored
    assert stored == core + 2 * d * d + 12 * (18 * 24 + 15 * d) + outside


def test_a_matrix_costs_its_making_and_its_product():
    _, model = condensed(tiny("sweet"))
    layer, rows = model.blocks[0].get_submodule("out"), 50
    mix, shape, product = 4 * 6 * 32 * 32, 4 * (32**3 + 32**3), rows * 4 * 32 * 32
    assert layer.multiply_adds(rows, backward=False) == mix + shape + product
    assert layer.multiply_adds(rows, backward=True) == 3 * (mix + shape + product)
    model.template.G.requires_grad_(False)
    assert layer.multiply_adds(rows, backward=True) == 2 * mix + 3 * (shape + product)
    assert dense_state(model)["blocks.0.out.weight"].shape == (32, 128)


def test_other_tensors_are_no_learngene_of_it():
    with pytest.raises(ArtifactError, match="no Tucker core"):
        tiny("sweet").module(tiny_arch(), {})
