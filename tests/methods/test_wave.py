"""WAVE: Kronecker sums against loops, a target's grid in depth and width, and what trains."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.methods import build, check
from fine_dist.methods.base import Parent
from fine_dist.methods.shared import dense_state
from fine_dist.methods.wave.config import WaveConfig
from fine_dist.methods.wave.kronecker import kron_sum, tiles_of
from fine_dist.methods.wave.width import fan_in, uniform
from fine_dist.model.arch import MATRICES, SIZES, arch
from fine_dist.model.roles import roles
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import artifact_for, condensed, parent_for, tiny


@pytest.mark.parametrize("order", ["scaler_template", "template_scaler"])
def test_a_weight_is_the_sum_of_kronecker_products_entry_by_entry(order, generator):
    scaler, templates = torch.randn(3, 2, 5, generator=generator), torch.randn(3, 4, 4, generator=generator)
    expected = torch.zeros(8, 20)
    for t in range(3):
        left, right = (scaler[t], templates[t]) if order == "scaler_template" else (templates[t], scaler[t])
        for i in range(left.shape[0]):
            for j in range(left.shape[1]):
                for k in range(right.shape[0]):
                    for m in range(right.shape[1]):
                        expected[i * right.shape[0] + k, j * right.shape[1] + m] += left[i, j] * right[k, m]
    torch.testing.assert_close(kron_sum(scaler, templates, order), expected)


def test_scaling_one_entry_places_a_whole_template_in_its_tile():
    templates = torch.arange(8.0).reshape(2, 2, 2)
    scaler = torch.zeros(2, 2, 3)
    scaler[1, 0, 2] = 10
    weight = kron_sum(scaler, templates, "scaler_template")
    assert weight[:2, 4:].tolist() == [[40, 50], [60, 70]] and int(weight.count_nonzero()) == 4
    torch.testing.assert_close(kron_sum(scaler, templates, "template_scaler"), torch.kron(templates[1], scaler[1]))


def test_a_layers_product_is_that_of_its_composed_weight():
    _, model = condensed(tiny("wave"))
    lively(model)
    layer = model.blocks[2].get_submodule("qkv")
    x = torch.randn(2, 5, 32)
    weight = sum(torch.kron(layer.S[t], model.templates["qkv"].T[t]) for t in range(len(layer.S)))
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, atol=1e-5, rtol=1e-5)


def test_as_many_templates_as_tiles_can_make_any_layer(generator):
    wanted = torch.randn(96, 32, generator=generator)
    count = tiles_of(tiny_arch(), 16)["qkv"]
    templates = torch.stack([wanted[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] for i in range(6) for j in range(2)])
    scaler = torch.eye(count).reshape(count, 6, 2)
    torch.testing.assert_close(kron_sum(scaler, templates, "scaler_template"), wanted)


def test_a_target_keeps_the_templates_and_trains_its_scalers_alone(generator):
    descent = tiny("wave").descend(parent_for("wave"), tiny_arch(num_layers=6), generator)
    known, model = roles(descent.model), descent.model
    assert descent.trains == "some"
    assert {known[name] for name, p in model.named_parameters() if p.requires_grad} == {"scaler"}
    for matrix in MATRICES:
        assert torch.equal(model.templates[matrix].T, artifact_for("wave").tensors[f"templates.{matrix}.T"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        tiny("wave").cost(model).trained == trained == 6 * sum(tiles**2 for tiles in tiles_of(model.arch, 16).values())
    )


def test_at_twice_the_width_the_function_is_the_parents_but_for_the_position_table(generator):
    parent = parent_for("wave")
    lively(parent.module, seed=5)
    a = tiny_arch(hidden_size=64, num_heads=8)
    wide = tiny("wave", scalers="linear").descend(parent, a, generator).model
    index = torch.arange(64) // 32 * 16 + torch.arange(64) % 16  # tiles of 16: 0, 0, 1, 1
    wide.pos.copy_(parent.module.pos[:, index])
    batch = inputs(a)
    # ten matrix products deep, outputs near 1: fp32 sums of another length
    torch.testing.assert_close(wide(*batch), parent.module(*batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [64, 48, 16])
@pytest.mark.parametrize("order", ["scaler_template", "template_scaler"])
def test_a_weight_of_another_width_is_the_parents_at_the_features_that_its_neighbours_take(order, width, generator):
    method = tiny("wave", order=order, scalers="linear")
    source = lively(condensed(method)[1])
    parent = Parent(artifact_for("wave"), source)
    target = method.descend(parent, tiny_arch(hidden_size=width), generator).model
    unit = 16 if order == "scaler_template" else 1
    feature = [int(i // unit * unit * 32 // width // unit * unit + i % unit) for i in range(width)]  # by hand
    often = torch.tensor([feature.count(f) for f in feature])
    scale = (max(1, 32 / width) ** 0.5) / often
    ours, theirs = (dense_state(model) for model in (target, source))
    rows = torch.tensor([32 * chunk + f for chunk in range(3) for f in feature])
    for name in ("blocks.1.qkv", "final.adaln"):
        chosen = rows if "qkv" in name else rows[: 2 * width]
        expected = theirs[f"{name}.weight"][chosen][:, feature] * scale
        torch.testing.assert_close(ours[f"{name}.weight"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[f"{name}.bias"], theirs[f"{name}.bias"][chosen])
    assert torch.equal(ours["label.weight"], theirs["label.weight"][:, feature])


def test_to_a_smaller_width_units_are_left_out_evenly_and_inputs_keep_their_variance():
    assert uniform(4, 2, chunks=3).tolist() == [0, 2, 4, 6, 8, 10]
    assert fan_in(4, 2).tolist() == pytest.approx([2**0.5] * 2)
    assert uniform(2, 3).tolist() == [0, 0, 1]
    assert fan_in(2, 3).tolist() == [0.5, 0.5, 1]


def test_what_is_stored_is_templates_scalers_and_the_rest():
    method, a = build(WaveConfig()), arch("DiT-B/2")
    with torch.device("meta"):
        module = method.blueprint(a)
    d, tiles = a.hidden_size, {"qkv": 108, "o": 36, "in": 144, "out": 144, "adaln": 216}
    templates = sum(count * 128**2 for count in tiles.values())
    assert templates == 18 * d * d  # as many numbers as one block
    scalers = 12 * sum(count**2 for count in tiles.values())
    outside = a.with_depth(1).count() - (18 * d * d + 15 * d)
    assert method.cost(module).stored == templates + scalers + 12 * 15 * d + outside


def test_a_matrix_costs_its_making_over_all_templates_and_its_product():
    _, model = condensed(tiny("wave"))
    o, rows, k = model.blocks[0].get_submodule("o"), 50, 4
    made, product = 32 * 32 * k, rows * 32 * 32
    assert o.multiply_adds(rows, backward=False) == made + product
    assert o.multiply_adds(rows, backward=True) == 3 * made + 3 * product
    model.templates.requires_grad_(False)
    assert o.multiply_adds(rows, backward=True) == 2 * made + 3 * product


def test_widths_that_templates_do_not_divide_and_another_order_are_refused():
    with pytest.raises(
        ConfigError, match=r"templates of 128 do not divide hidden_size 32; one of \[1, 2, 4, 8, 16, 32\]"
    ):
        build(WaveConfig()).auxiliary(tiny_arch())
    with pytest.raises(ArtifactError, match="hidden_size 40 of the target is no multiple of 16"):
        check(tiny("wave"), artifact_for("wave"), tiny_arch(hidden_size=40))
    with pytest.raises(ArtifactError, match=r"condensed with method.order scaler_template"):
        check(tiny("wave", order="template_scaler"), artifact_for("wave"), tiny_arch())


@pytest.mark.parametrize("size", SIZES)
def test_the_default_templates_divide_every_named_width(size):
    assert build(WaveConfig()).auxiliary(arch(f"DiT-{size}/2")).hidden_size % WaveConfig().side == 0
