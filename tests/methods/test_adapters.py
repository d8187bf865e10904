"""The five adapters: peft's own merged weights, what trains, what is stored, what they cost."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from fine_dist.methods.adapters.wrapping import Adapted
from fine_dist.model.arch import arch as named
from fine_dist.model.dit import DiT
from fine_dist.model.roles import count_by_role
from tests.conftest import inputs
from tests.methods.making import dense, method_of, model_parent, nudge, num_trained, saved_and_read

NAMES = ("lora", "pissa", "oft", "boft", "vera")
D = 32


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return model_parent(tmp_path_factory.mktemp("parent") / "model", num_layers=2)


def target(name, parent, **settings):
    method = method_of(name, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no compiler is started for BOFT, no block size is changed behind the scenes
        return method, method.descend(parent, parent.arch, torch.Generator().manual_seed(0)).model


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_as_its_parent_and_wraps_four_matrices_of_a_block(name, parent):
    _, model = target(name, parent)
    batch = inputs(model.arch)
    # PiSSA takes W apart and adds it up again, in fp32
    torch.testing.assert_close(model(*batch), parent.module(*batch), atol=1e-5, rtol=1e-5)
    wrapped = [n for n, module in model.named_modules() if isinstance(module, Adapted)]
    assert wrapped == [f"blocks.{layer}.{matrix}" for layer in range(2) for matrix in ("qkv", "o", "in", "out")]


@pytest.mark.parametrize("name", NAMES)
def test_only_adapters_train_by_their_papers_formula(name, parent):
    _, model = target(name, parent)
    sides = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)]
    formula = {
        "lora": lambda m, n: 8 * (m + n),
        "pissa": lambda m, n: 8 * (m + n),
        "oft": lambda m, n: n * 31 // 2,
        "boft": lambda m, n: n * 4 + m,
        "vera": lambda m, n: 256 + m,
    }[name]
    assert num_trained(model) == count_by_role(model)["scaler"] == 2 * sum(formula(m, n) for m, n in sides)
    nudge(model)
    model(*inputs(model.arch)).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_pefts_own_and_compute_the_same(name, parent):
    method, model = target(name, parent)
    nudge(model)
    state = method.merge(model)
    theirs = copy.deepcopy(model)
    for module_name, module in theirs.named_modules():
        if isinstance(module, Adapted):
            module.tuned.merge(safe_merge=True)
            assert torch.equal(state[f"{module_name}.weight"], module.tuned.base_layer.weight)
            assert not torch.equal(state[f"{module_name}.weight"], model.get_submodule(module_name).base.weight)
    batch = inputs(model.arch)
    torch.testing.assert_close(dense(method, model)(*batch), model(*batch), atol=1e-5, rtol=1e-5)
    again = method.merge(model)
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())


def test_lora_and_vera_are_their_equations(parent):
    method, model = target("lora", parent, rank=4, alpha=12)
    nudge(model)
    tuned = model.blocks[1].o.tuned
    a, b = tuned.lora_A["default"].weight, tuned.lora_B["default"].weight
    expected = parent.module.blocks[1].o.weight + 12 / 4 * b @ a
    torch.testing.assert_close(method.merge(model)["blocks.1.o.weight"], expected.detach(), atol=1e-6, rtol=1e-5)
    method, model = target("vera", parent, rank=16)
    nudge(model)
    tuned = model.blocks[0].get_submodule("in").tuned
    a, b = tuned.vera_A["default"][:, :D], tuned.vera_B["default"][: 4 * D]
    scaled = tuned.vera_lambda_b["default"][:, None] * b @ (tuned.vera_lambda_d["default"][:, None] * a)
    expected = parent.module.blocks[0].get_submodule("in").weight + scaled
    torch.testing.assert_close(method.merge(model)["blocks.0.in.weight"], expected.detach(), atol=1e-6, rtol=1e-5)


def test_pissa_trains_the_principal_components(parent):
    _, model = target("pissa", parent)
    weight = parent.module.blocks[0].o.weight.detach()
    tuned = model.blocks[0].o.tuned
    u, s, vt = torch.linalg.svd(weight)
    product = tuned.lora_B["default"].weight @ tuned.lora_A["default"].weight
    torch.testing.assert_close(product.detach(), (u[:, :8] * s[:8]) @ vt[:8], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_comes_back_bit_for_bit_and_stores_little_beside_its_parent(name, parent, tmp_path):
    method, model = target(name, parent)
    nudge(model)
    back, inherited = saved_and_read(tmp_path / "t", method, model, parent)
    batch = inputs(model.arch)
    assert torch.equal(back(*batch), model(*batch))
    base = {f"blocks.{i}.{m}.weight" for i in range(2) for m in ("qkv", "o", "in", "out")}
    assert base.isdisjoint(inherited) if name == "pissa" else base <= set(inherited)
    assert sum("vera_A" in key for key in model.state_dict()) == (name == "vera")


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_draws_whatever_torchs_own_generator_says(name, parent):
    torch.manual_seed(1)
    _, one = target(name, parent)
    torch.manual_seed(2)
    _, two = target(name, parent)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_costs_count_frozen_weights_and_adapters(parent):
    shape = named("DiT-B/2", num_layers=2)
    frozen = DiT(shape.with_depth(2)).requires_grad_(False)
    base = method_of("scratch").cost(frozen, 4)
    for name in NAMES:
        method, model = target(name, parent)
        cost = method.cost(model, 4)
        assert cost.trained == num_trained(model) and cost.training > 2 * cost.forward - 1
    rows, layers = 4 * 256, 2
    with torch.device("meta"):
        model = method_of("lora").adapted(DiT(shape), 0, fresh=False)
    cost = method_of("lora").cost(model.requires_grad_(False), 4)
    thin = 8 * 768 * (3 + 1 + 1 + 1 + 4 + 1 + 1 + 4) * rows * layers
    assert cost.forward - base.forward == pytest.approx(2 * thin / 4)
