"""KIND: the gate of each sample, what it hides, what deploying drops, what a transfer trains, and what it saves."""

from __future__ import annotations

import copy

import pytest
import torch

from fine_dist.artifacts.targets import descend
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.methods import build, check
from fine_dist.methods.kind.config import KindConfig
from fine_dist.methods.kind.gates import GATED, GatedDiT, neighbours
from fine_dist.model.arch import arch
from fine_dist.model.dit import DiT
from fine_dist.model.flops import model_cost
from fine_dist.model.roles import roles, train_only
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import artifact_for, condensed, parent_for, tiny


@pytest.fixture
def model():
    """Four learngenes and three groups of two tailors; classes 0-3, 4-6 and 7-9."""
    return lively(condensed(tiny("kind", learngenes=4, tailors=6, groups=3))[1], std=0.3)


def ask(model, labels, seed=0):
    """The model's outputs [B, ...] for one and the same noised latent under several labels."""
    z, t, _ = inputs(model.arch, 1, seed)
    y = torch.tensor(labels)
    return model(z.expand(len(y), -1, -1, -1), t.expand(len(y)), y)


def loss_of(model, labels):
    return ask(model, labels).square().mean()


def test_a_product_is_the_sum_over_the_components_that_the_samples_class_opens(model):
    layer = model.blocks[1].get_submodule("in")
    labels, x = [5, 0, 10], torch.randn(3, 7, 32)
    _, condition = model.embed(*inputs(model.arch)[:2], torch.tensor(labels))
    got = layer(x, condition)
    for b, group in enumerate([1, 0, None]):
        for token in range(7):
            expected = layer.bias.clone()
            for i in range(4):
                expected = expected + (x[b, token] @ layer.V[:, i]) * layer.sigma[i] * layer.U[:, i]
            for i in range(6):
                if group is not None and i // 2 == group:
                    thin = x[b, token] @ layer.tailor_V[:, i]
                    expected = expected + thin * layer.tailor_sigma[i] * layer.tailor_U[:, i]
            torch.testing.assert_close(got[b, token], expected, atol=1e-5, rtol=1e-5)


def test_two_samples_of_a_batch_meet_their_own_gates(model):
    together = ask(model, [1, 8, 10])
    for row, label in enumerate([1, 8, 10]):
        torch.testing.assert_close(together[row : row + 1], ask(model, [label]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_masked_components_get_no_gradient(model, recompute):
    model.recompute = recompute
    loss_of(model, [0, 9, 10]).backward()  # groups 0 and 2, and the null label
    for _, _, layer in model.gated():
        for tailor in (layer.tailor_U.grad, layer.tailor_V.grad, layer.tailor_sigma.grad[None]):
            assert torch.count_nonzero(tailor[:, 2:4]) == 0
            assert tailor[:, :2].any() and tailor[:, 4:].any()
        assert layer.U.grad.any()


def test_recomputed_blocks_give_the_same_gradients(model):
    again = copy.deepcopy(model)
    again.recompute = "blocks"
    loss_of(model, [0, 5, 10]).backward()
    loss_of(again, [0, 5, 10]).backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_null_label_uses_learngenes_alone(model):
    before, before_class = ask(model, [10]), ask(model, [0])
    with torch.no_grad():
        for _, _, layer in model.gated():
            layer.tailor_sigma.zero_()
    assert torch.equal(ask(model, [10]), before)
    assert not torch.allclose(ask(model, [0]), before_class)


def test_the_ordinary_model_of_a_group_is_the_same_function_for_its_classes(model):
    for group, label in ((0, 2), (2, 7), (-1, 10)):
        dense = DiT(model.arch)
        dense.load_state_dict(model.merge(group))
        torch.testing.assert_close(ask(dense, [label]), ask(model, [label]), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, model.merge(1)[name]) for name, tensor in model.merge(1).items())


# --- deploying and transferring -------------------------------------------------------------------------------------


def test_deploying_drops_the_tailors_of_other_groups_and_nothing_else():
    parent = parent_for("kind")
    descent = tiny("kind", deploy=(1,)).descend(parent, parent.arch, torch.Generator())
    small, whole = descent.model, parent.module
    assert descent.trains == "nothing"
    torch.testing.assert_close(ask(small, [7, 9]), ask(whole, [7, 9]))  # classes of the second half
    torch.testing.assert_close(ask(small, [10]), ask(whole, [10]))
    assert not torch.allclose(ask(small, [0]), ask(whole, [0]))  # it has learngenes alone now
    dropped = 4 * 8 * sum(m + n + 1 for m, n in map(small.arch.matrix, GATED))  # 4 layers, 8 of 16 tailors
    assert model_cost(whole).stored - model_cost(small).stored == dropped
    assert model_cost(small).forward < model_cost(whole).forward


def test_without_any_tailors_learngenes_remain():
    parent = parent_for("kind")
    bare = tiny("kind", deploy=()).descend(parent, parent.arch, torch.Generator()).model
    torch.testing.assert_close(ask(bare, [10]), ask(parent.module, [10]))
    assert not [name for name, p in bare.named_parameters() if roles(bare)[name] == "tailor" and p.numel()]


@pytest.mark.parametrize("transfer", ["keep", "redraw"])
def test_a_transfer_freezes_learngenes_and_trains_tailors_and_the_label_embedder(transfer, generator):
    parent = parent_for("kind")
    descent = tiny("kind", transfer=transfer).descend(parent, tiny_arch(num_classes=6), generator)
    known, model = roles(descent.model), descent.model
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    assert descent.trains == "some"
    assert {known[name] for name in moving - {"label.weight"}} == {"tailor"} and "label.weight" in moving
    for name, tensor in parent.artifact.tensors.items():
        if known.get(name) in ("gene", "bias", "weight") or (known.get(name) == "shell" and name != "label.weight"):
            assert torch.equal(model.get_parameter(name), tensor), name
        if known.get(name) == "tailor":
            assert torch.equal(model.get_parameter(name), tensor) == (transfer == "keep")
    assert model.label.weight.shape == (7, 32)
    assert torch.equal(model.label.weight[-1], parent.module.label.weight[-1])
    assert model.gate.group.tolist() == [0, 0, 0, 1, 1, 1, -1]
    loss_of(model, [0, 5, 6]).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in moving)


def test_tailors_drawn_anew_are_not_those_that_stage_1_drew_with_the_same_seed():
    parent = parent_for("kind")
    arch = parent.arch
    drawn = tiny("kind").condense(arch, None, torch.Generator().manual_seed(7)).module
    again = tiny("kind", transfer="redraw").descend(parent, arch, torch.Generator().manual_seed(7)).model
    known = roles(drawn)
    for name, p in again.named_parameters():
        if known[name] == "tailor" and p.std() > 0:
            assert not torch.equal(p, drawn.get_parameter(name)), name


def test_a_stage_that_wants_new_labels_gets_a_gate_for_them():
    descent = descend(tiny("kind"), parent_for("kind"), tiny_arch(num_classes=3), seed=0, new_labels=True)
    assert descent.model.arch.num_classes == 3 and descent.model.gate.group.tolist() == [0, 0, 1, -1]
    assert descent.model.label.weight.requires_grad
    assert ask(descent.model, [0, 2, 3]).isfinite().all()


# --- sizes, and what is saved ---------------------------------------------------------------------------------------


def test_the_default_sizes_are_the_later_presets():
    with torch.device("meta"):
        module = build(KindConfig()).blueprint(arch("DiT-XL/2-L1"))
    assert module.sizes == (576, 288, 2)  # N_G = N_T = 576 with 288 active


def test_on_dit_l_416_active_components_save_the_papers_35_4_gflops():
    """The paper counts multiply-adds; one sample, without a backward pass, the whole model beside the whole model."""
    a = arch("DiT-L/2")
    with torch.device("meta"):
        dense = model_cost(DiT(a)).forward / 2
        savings = {}
        for tailors in (160, 161):
            deployed = GatedDiT(a, 256, tailors, 1, [0] * 1001)
            savings[256 + tailors] = dense - model_cost(deployed).forward / 2
    assert savings[416] / 1e9 == pytest.approx(35.4, abs=0.05)
    assert savings[416] / 1e9 == pytest.approx(77.31 - 0.10066 * 416, abs=0.01)
    assert (savings[416] - savings[417]) / 1e9 == pytest.approx(0.10066, abs=1e-5)


def test_frozen_learngenes_cost_no_weight_gradient(model):
    layer, rows = model.blocks[0].get_submodule("o"), 5
    one = rows * (32 + 32)  # multiply-adds a component
    assert layer.multiply_adds(rows, backward=False) == 10 * one
    assert layer.multiply_adds(rows, backward=True) == 3 * 10 * one
    layer.U.requires_grad_(False)
    assert layer.multiply_adds(rows, backward=True) == (2 * 4 + 3 * 6) * one


def test_classes_that_follow_each_other_form_groups_of_nearly_one_size():
    table = neighbours(10, 3)
    assert table == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, -1]
    own = condensed(tiny("kind", table=(1, 0) * 5))[1]
    assert own.gate.group.tolist() == [1, 0] * 5 + [-1]


def test_impossible_gates_are_refused():
    with pytest.raises(ConfigError, match=r"tailors: 7 cannot be divided into 2 groups; try 8"):
        tiny("kind", tailors=7).auxiliary(tiny_arch())
    with pytest.raises(ConfigError, match=r"a group from 0 to 1 for each of 10 classes"):
        tiny("kind", table=(0, 1, 2)).auxiliary(tiny_arch())
    with pytest.raises(ArtifactError, match="has no group 2; legal: 0 to 1"):
        check(tiny("kind", deploy=(2,)), artifact_for("kind"), tiny_arch())
    with pytest.raises(ArtifactError, match="deployed tailors are for the parent's classes"):
        check(tiny("kind", deploy=(0,)), artifact_for("kind"), tiny_arch(num_classes=7))


def test_on_dit_l_104_tailors_beside_312_learngenes_train_the_papers_45_4_million():
    """A count that agrees with the paper's 45.4M, not a statement of the paper: no public text found here names the
    numbers of components. 312 + 104 are the 416 that save its 35.4 GFLOPs, and 104 tailors with the shell of 1,000
    classes have 45.4M parameters. 112 tailors with labels and biases alone round to the same."""
    a = arch("DiT-L/2")
    with torch.device("meta"):
        model = train_only(GatedDiT(a, 312, 104, 1, [0] * 1001), "tailor", "shell")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_hand = 24 * 104 * (16 * 1024 + 4)  # U and V of four matrices have 4 D + 2 D + 5 D + 5 D rows; four sigmas
    by_hand += a.count() - 24 * (18 * 1024**2 + 15 * 1024)  # what is outside the blocks
    assert trained == by_hand and trained / 1e6 == pytest.approx(45.4, abs=0.05)
