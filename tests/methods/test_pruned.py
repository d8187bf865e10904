"""Depth pruning: which layers are kept, and what a target of them computes."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from fine_dist.core.errors import ArtifactError
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.methods import check
from fine_dist.methods.pruned import LayerChoice, best_layers, group_sizes
from fine_dist.model.dit import DiT
from tests.conftest import inputs, tiny_arch
from tests.methods.making import dense, method_of, model_parent, nudge, num_trained, saved_and_read


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return model_parent(tmp_path_factory.mktemp("parent") / "model", num_layers=6)


def pruned(parent, depth: int, **settings: Any):
    method = method_of("pruned", **settings)
    check(method, parent.artifact, tiny_arch(num_layers=depth))
    return method, method.descend(parent, tiny_arch(num_layers=depth), torch.Generator().manual_seed(0)).model


def layers_of(model, parent) -> list[int]:
    """Which of the parent's layers each of a target's is."""
    state, theirs = model.state_dict(), parent.module.state_dict()
    return [
        next(j for j in range(6) if torch.equal(state[f"blocks.{i}.in.weight"], theirs[f"blocks.{j}.in.weight"]))
        for i in range(len(model.blocks))
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"choose": "even"}, [0, 2, 5]),
        ({"layers": (1, 3, 4)}, [1, 3, 4]),
    ],
)
def test_the_layers_asked_for_are_kept_with_all_else_as_it_is(settings, expected, parent):
    _, model = pruned(parent, 3, **settings)
    assert layers_of(model, parent) == expected
    by_hand = copy.deepcopy(parent.module)
    by_hand.blocks = torch.nn.ModuleList(by_hand.blocks[i] for i in expected)
    batch = inputs(model.arch)
    assert torch.equal(model(*batch), by_hand(*batch))


def test_a_deeper_target_repeats_layers_whose_steps_add_up_to_their_own(parent):
    _, model = pruned(parent, 12)
    assert layers_of(model, parent) == sorted(2 * list(range(6)))
    for layer in range(12):
        for matrix in ("o", "out"):
            theirs = parent.module.blocks[layer // 2].get_submodule(matrix)
            own = model.blocks[layer].get_submodule(matrix)
            torch.testing.assert_close(own.weight, theirs.weight / 2)
            torch.testing.assert_close(own.bias, theirs.bias / 2)


def test_best_is_the_lowest_loss_of_all_choices_where_they_are_few(parent):
    z = torch.randn(24, *parent.arch.latent_shape, generator=torch.Generator().manual_seed(1))
    samples = (z, torch.arange(24) % 10)
    _, model = pruned(replace(parent, samples=samples), 4, choose="best")
    loss, found = HeldOutLoss(*samples, DiffusionConfig()), {}
    for layers in itertools.combinations(range(6), 4):
        candidate = DiT(tiny_arch(num_layers=4))
        state = {n: t for n, t in parent.module.state_dict().items() if not n.startswith("blocks.")}
        for i, j in enumerate(layers):
            state |= {f"blocks.{i}.{n}": t for n, t in parent.module.blocks[j].state_dict().items()}
        candidate.load_state_dict(state)
        found[layers] = loss(candidate)["held_out_loss"]
    assert tuple(layers_of(model, parent)) == min(found, key=found.__getitem__)
    assert len(parent.module.blocks) == 6  # and the parent is as it was


def test_where_choices_are_many_the_layer_least_missed_is_dropped_each_time():
    values = [1.0, 50.0, 2.0, 31.0, 3.0, 20.0, 4.0, 5.0, 6.0, 7.0]

    class Stack(torch.nn.Module):
        """Layers of known values."""

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in values)
            for block, value in zip(self.blocks, values):
                torch.nn.init.constant_(block.weight, value)

    def loss(model: Any) -> dict[str, float]:
        return {"held_out_loss": abs(100 - sum(float(block.weight) for block in model.blocks))}

    kept = list(range(10))
    while len(kept) > 5:
        misses = {drop: abs(100 - sum(values[x] for x in kept if x != drop)) for drop in kept}
        kept.remove(min(misses, key=misses.__getitem__))
    assert best_layers(Stack(), loss, 5) == kept  # of 252 choices


def test_best_without_data_says_what_to_do(parent):
    with pytest.raises(ArtifactError, match=r"set data\.shards, or choose first or even"):
        pruned(parent, 3, choose="best")


def test_wrong_layers_and_groups_are_refused(parent):
    for settings, says in (
        ({"layers": (0, 1)}, r"\[0, 1\] are 2 layers"),
        ({"layers": (0, 1, 6)}, r"needs 3 layers of 0 to 5"),
        ({"choose": "learned", "groups": 2}, r"3 of 6 layers cannot be learned in 2 groups; legal: \[1, 3\]"),
    ):
        with pytest.raises(ArtifactError, match=says):
            pruned(parent, 3, **settings)
    assert group_sizes(28, 14, None) == (7, 4, 2) and group_sizes(28, 14, 14) == (14, 2, 1)
    assert group_sizes(12, 6, None) == (3, 4, 2) and group_sizes(6, 4, None) == (1, 6, 4)


# --- the learned choice ----------------------------------------------------------------------------------------------


def test_the_learned_choice_trains_masks_and_low_rank_updates_alone(parent):
    _, model = pruned(parent, 4, choose="learned", groups=2, rank=2)
    assert isinstance(model, LayerChoice) and len(model.blocks) == 6 and model.arch.num_layers == 4
    sides = sum(sum(model.arch.matrix(matrix)) for matrix in ("qkv", "o", "in", "out", "adaln"))
    assert num_trained(model) == 2 * 3 + 6 * 2 * sides  # logits of C(3, 2) masks in 2 groups, and r (m + n) a matrix


def test_exactly_as_many_layers_as_asked_take_their_step_and_the_mask_has_a_gradient(parent):
    method, model = pruned(parent, 4, choose="learned", groups=2)
    before = method.before_step(model)
    seen = set()
    for step in range(12):
        before(step, torch.Generator().manual_seed(step))
        gates = model.gates()
        assert torch.equal(gates.detach().round(), gates.detach()) and float(gates.sum()) == 4
        assert float(gates[:3].sum()) == 2  # two of every three
        seen.add(tuple(gates.tolist()))
    assert len(seen) > 3
    nudge(model)
    model(*inputs(model.arch)).square().mean().backward()
    assert model.logits.table.grad.abs().min() > 0


@pytest.mark.parametrize("rest", [0.0, 0.02])
def test_it_learns_to_keep_the_layers_that_matter(rest, parent):
    """Four of six layers are the identity, or nearly; after some steps of all that trains, the other two are kept."""
    ancestor = copy.deepcopy(parent)
    with torch.no_grad():
        for layer in (0, 2, 3, 5):
            for name in ("o", "out"):
                ancestor.module.blocks[layer].get_submodule(name).weight.mul_(rest)
                ancestor.module.blocks[layer].get_submodule(name).bias.mul_(rest)
    method, model = pruned(ancestor, 2, choose="learned", groups=2)
    batch = inputs(model.arch)
    wanted = ancestor.module(*batch).detach()
    updates = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("logits")]
    optimizer = torch.optim.Adam([{"params": [model.logits.table], "lr": 0.1}, {"params": updates, "lr": 1e-3}])
    for step in range(60):
        method.before_step(model)(step, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(*batch) - wanted).square().mean().backward()
        optimizer.step()
    assert model.kept() == [1, 4]
    assert method.tables(model)["layers"].flatten()[[1, 4]].min() > 0.6
    _, others = pruned(ancestor, 2, layers=(0, 3))
    with torch.no_grad():
        kept = float((dense(method, model)(*batch) - wanted).norm())  # the ancestor's own layers, without the updates
        assert kept < 0.2 * float((others(*batch) - wanted).norm()) and (rest or kept < 1e-4)


def test_what_was_learned_comes_back_and_merges_to_the_ancestors_own_layers(parent, tmp_path):
    method, model = pruned(parent, 4, choose="learned", groups=2)
    nudge(model)
    back, inherited = saved_and_read(tmp_path / "t", method, model, parent)
    batch = inputs(model.arch)
    with torch.no_grad():
        assert torch.equal(back(*batch), model(*batch))
    assert "blocks.0.qkv.weight" in inherited  # stored once, with the parent
    assert layers_of(dense(method, model), parent) == model.kept()
