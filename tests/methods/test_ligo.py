"""LiGO's operators against loops, and the copies that they reproduce."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ArtifactError
from fine_dist.methods import check
from fine_dist.methods.axes import axes_of
from fine_dist.methods.ligo.growth import SPACES, GrownDiT, Widen, size_of, stacked
from fine_dist.model.arch import MATRICES
from fine_dist.model.arch import arch as named
from tests.conftest import inputs, tiny_arch
from tests.methods.making import dense, method_of, model_parent, nudge, num_trained, saved_and_read

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 2}
LARGE = {"hidden_size": 24, "num_heads": 3, "num_layers": 5}


def count_operators(arch, width, layers):
    """Numbers that train: five depth operators, and M of the five spaces."""
    small = arch.model_copy(update={"hidden_size": width})
    sides = [(size_of(small, space), size_of(arch, space)) for space in SPACES]
    return len(MATRICES) * arch.num_layers * layers + sum((d2 - d1) * d1 for d1, d2 in sides)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return model_parent(tmp_path_factory.mktemp("parent") / "model", **SMALL)


def target(parent, seed=0, **fields):
    method = method_of("ligo")
    return method, method.descend(parent, tiny_arch(**{**LARGE, **fields}), torch.Generator().manual_seed(seed)).model


def test_width_rows_are_the_identity_and_uniform_rows_of_sum_one(generator):
    operator = Widen(4, 7, generator)
    full = operator(torch.eye(4), 0, 1)  # B itself
    assert torch.equal(full[:4], torch.eye(4)) and full.shape == (7, 4)
    assert (full[4:] > 0).all()
    torch.testing.assert_close(full[4:].sum(1), torch.ones(3))


def test_depth_begins_by_stacking_with_a_little_noise_and_rows_of_sum_one(generator):
    operator = stacked(5, 2, 0.03, generator)
    torch.testing.assert_close(operator.sum(1), torch.ones(5))
    assert operator.argmax(1).tolist() == [0, 1, 0, 1, 0] and float(operator.min()) > 0
    for layers, main in ((3, 0.97), (6, 0.93), (12, 0.85)):  # the authors' figures
        rows = stacked(40 * layers, layers, 0.03, generator)
        assert float(rows.amax(1).mean()) == pytest.approx(main, abs=0.012)


def test_a_grown_matrix_is_its_equation_entry_by_entry(parent):
    method, model = target(parent)
    nudge(model)
    state, theirs = method.merge(model), parent.module.state_dict()
    m_heads, m_stream = model.widen["heads"].M.detach(), model.widen["stream"].M.detach()
    b_heads, b_stream = (torch.cat([torch.eye(16), m]) for m in (m_heads, m_stream))
    depth = model.sources["qkv"].depth.detach()
    layer = 3
    mixed = sum(depth[layer, j] * theirs[f"blocks.{j}.qkv.weight"] for j in range(2))
    mixed_bias = sum(depth[layer, j] * theirs[f"blocks.{j}.qkv.bias"] for j in range(2))
    for third in range(3):
        for row in (0, 15, 16, 23):
            at = 24 * third + row
            bias = sum(b_heads[row, i] * mixed_bias[16 * third + i] for i in range(16))
            torch.testing.assert_close(state[f"blocks.{layer}.qkv.bias"][at], bias)
            for column in (0, 17):
                entry = sum(
                    b_heads[row, i] * mixed[16 * third + i, j] * b_stream[column, j]
                    for i in range(16)
                    for j in range(16)
                )
                torch.testing.assert_close(state[f"blocks.{layer}.qkv.weight"][at, column], entry, atol=1e-5, rtol=1e-5)


def test_identity_operators_reproduce_a_width_copy_and_a_stacked_depth(parent):
    # M whose rows pick one old unit each copies units; a depth operator without noise stacks layers.
    method, model = target(parent)
    picks = {}
    with torch.no_grad():
        for space, operator in model.widen.items():
            old, new = operator.M.shape[1], operator.M.shape[0]
            chosen = torch.arange(new) * 3 % old
            operator.M.copy_(torch.eye(old)[chosen])
            picks[space] = torch.cat([torch.arange(old), chosen])
        for matrix in ("qkv", "o", "in", "out", "adaln"):
            model.sources[matrix].depth.copy_(torch.eye(2)[torch.arange(5) % 2])
    theirs = parent.module.state_dict()
    for name, tensor in method.merge(model).items():
        source = theirs[name if not name.startswith("blocks.") else f"blocks.{int(name.split('.')[1]) % 2}" + name[8:]]
        for dim, axis in enumerate(axes_of(name)):
            if axis is not None:
                span = source.shape[dim] // axis.groups
                index = torch.cat([group * span + picks[axis.space] for group in range(axis.groups)])
                source = source.index_select(dim, index)
        torch.testing.assert_close(tensor, source, atol=1e-6, rtol=1e-6)


def test_growing_in_no_direction_keeps_the_parent(parent, generator):
    method = method_of("ligo", noise=0)
    model = method.descend(parent, parent.arch, generator).model
    theirs = parent.module.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in method.merge(model).items())


def test_operators_alone_train_and_merging_keeps_the_function(parent):
    method, model = target(parent)
    may = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith((".M", ".depth")) for name in may) and len(may) == 10
    nudge(model)
    batch = inputs(model.arch)
    torch.testing.assert_close(dense(method, model)(*batch), model(*batch), atol=1e-5, rtol=1e-5)
    model(*batch).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == may
    assert method.tables(model)["qkv"].shape == (5, 2)


def test_a_target_comes_back_whole(parent, tmp_path):
    method, model = target(parent)
    nudge(model)
    back, _ = saved_and_read(tmp_path / "t", method, model, parent)
    batch = inputs(model.arch)
    assert torch.equal(back(*batch), model(*batch))
    assert set(dense(method, back).state_dict()) == set(dense(method, model).state_dict())


def test_counts_are_the_formulas_from_b_to_l(parent):
    large = named("DiT-L/2")
    with torch.device("meta"):
        model = GrownDiT(large, 768, 12)
    small = named("DiT-B/2")
    spaces = 4 * 256 * 768 + 1024 * 3072  # stream, condition, time, heads; hidden
    assert count_operators(large, 768, 12) == spaces + 5 * 24 * 12
    assert sum(p.numel() for p in model.parameters()) == small.count() + spaces + 5 * 24 * 12
    method, tiny = target(parent)
    cost = method.cost(tiny, 3)
    assert cost.trained == num_trained(tiny) == count_operators(tiny.arch, 16, 2)
    merged = method_of("scratch").cost(dense(method, tiny), 3)
    assert cost.forward > merged.forward and cost.training > merged.training  # growing is paid for at every step


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_layers": 1}, "num_layers is 2 in the parent, 1 in the target"),
        ({"hidden_size": 8, "num_heads": 2}, "hidden_size is 16 in the parent, 8"),
    ],
)
def test_a_smaller_target_is_refused(fields, words, parent):
    with pytest.raises(ArtifactError, match=words):
        check(method_of("ligo"), parent.artifact, tiny_arch(**{**SMALL, **fields}))
