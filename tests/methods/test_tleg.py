"""TLEG against its own equation, and the numbers that its papers and tables state."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fine_dist.methods import build
from fine_dist.methods.settings import TlegConfig
from fine_dist.model.arch import MATRICES, arch
from tests.conftest import inputs, tiny_arch
from tests.methods.making import artifact_for, condensed, parent_for, tiny


@pytest.mark.parametrize("depth", [1, 5])
def test_a_targets_layers_lie_on_the_line_biases_too(depth, generator):
    learngene = artifact_for("tleg").tensors
    state = tiny("tleg").descend(parent_for("tleg"), tiny_arch(num_layers=depth), generator).model.state_dict()
    for matrix in MATRICES:
        for ours, theirs in (("weight", ""), ("bias", "_bias")):
            base, slope = learngene[f"genes.{matrix}.base{theirs}"], learngene[f"genes.{matrix}.slope{theirs}"]
            for layer in range(1, depth + 1):  # as the paper counts them
                expected = base + (layer - 1) / depth * slope
                torch.testing.assert_close(state[f"blocks.{layer - 1}.{matrix}.{ours}"], expected)
    assert torch.equal(state["label.weight"], learngene["label.weight"])


def test_a_targets_first_layer_is_theta_b_and_each_step_in_depth_is_the_same(generator):
    model = tiny("tleg").descend(parent_for("tleg"), tiny_arch(num_layers=4), generator).model
    layers = [block.get_submodule("in").weight for block in model.blocks]
    assert torch.equal(layers[0], artifact_for("tleg").tensors["genes.in.base"])
    for lower, upper in pairwise(layers):
        torch.testing.assert_close(upper - lower, layers[1] - layers[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "millions"), [("DiT-B/2", 24.0), ("DiT-L/2", 42.3)])
def test_what_is_stored_is_two_blocks_and_the_rest(name, millions):
    method, a = build(TlegConfig()), arch(name)
    with torch.device("meta"):
        module = method.blueprint(a)
    assert module.arch.num_layers == 12 != a.num_layers or name == "DiT-B/2"
    d = a.hidden_size
    outside = a.with_depth(1).count() - (18 * d * d + 15 * d)
    assert method.cost(module).stored == 2 * (18 * d * d + 15 * d) + outside
    assert method.cost(module).stored / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_auxiliary_model_has_the_depth_of_the_setting_or_of_arch():
    assert build(TlegConfig()).auxiliary(tiny_arch(num_layers=28)).num_layers == 12
    assert build(TlegConfig(auxiliary_layers=None)).auxiliary(tiny_arch(num_layers=28)).num_layers == 28


def test_both_ends_start_from_a_truncated_normal_and_blocks_as_the_identity():
    _, model = condensed(tiny("tleg"))
    for end in ("base", "slope"):
        weight = getattr(model.genes["in"], end).detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05) and float(weight.mean()) == pytest.approx(
            0, abs=1e-3
        )
        assert not getattr(model.genes["in"], f"{end}_bias").any() and not getattr(model.genes["adaln"], end).any()
    z, t, y = inputs(model.arch)
    x, condition = model.embed(z, t, y)
    assert torch.equal(model.blocks[2](x, condition), x)


def test_a_composed_matrix_costs_its_making_and_its_product():
    _, model = condensed(tiny("tleg"))
    line = model.blocks[0].get_submodule("o")
    made, product = 32 * 32, 7 * 32 * 32
    assert line.multiply_adds(7, backward=False) == made + product
    assert line.multiply_adds(7, backward=True) == 2 * made + 3 * product  # slope's gradient is one more pass over W
    model.requires_grad_(False)
    assert line.multiply_adds(7, backward=True) == made + 2 * product
    assert line.saved_for_backward(7) == made
