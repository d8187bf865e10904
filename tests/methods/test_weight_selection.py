"""Weight selection against indices written down by hand."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ArtifactError
from fine_dist.methods import METHODS, build, check, parent_of
from fine_dist.methods.weight_selection import uniform
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from tests.conftest import inputs, lively, tiny_arch

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 2}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    model = lively(DiT(tiny_arch()))
    folder = tmp_path_factory.mktemp("parent") / "model"
    save_artifact(folder, kind="model", method={"name": "scratch"}, arch=model.arch, tensors=model.state_dict())
    return parent_of(load_artifact(folder))


def method(**settings):
    return build(METHODS["weight_selection"].Config(name="weight_selection", **settings))


def test_indices_go_by_stride_where_it_divides_and_are_spread_evenly_where_not():
    assert uniform(8, 4).tolist() == [0, 2, 4, 6]
    assert uniform(9, 3).tolist() == [0, 3, 6]
    assert uniform(8, 3).tolist() == [0, 4, 7]  # linspace 0, 3.5, 7; 3.5 rounds to even
    assert uniform(10, 4).tolist() == [0, 3, 6, 9]
    assert uniform(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_narrower_shallower_target_takes_the_entries_found_by_hand(parent, generator):
    arch = tiny_arch(**SMALL)
    model = method().descend(parent, arch, generator).model
    theirs = parent.module.state_dict()
    stream = list(range(0, 32, 2))  # 16 of 32 by stride
    heads = [*range(0, 8), *range(16, 24)]  # heads 0 and 2 of 4, all 8 units of each
    hidden = list(range(0, 128, 2))  # 64 of 128
    by_hand = {
        "patch.weight": (stream, range(4)),
        "blocks.1.qkv.weight": ([32 * third + i for third in range(3) for i in heads], stream),
        "blocks.1.o.weight": (stream, heads),
        "blocks.1.in.weight": (hidden, stream),
        "blocks.1.out.weight": (stream, hidden),
        "blocks.1.adaln.weight": ([32 * sixth + i for sixth in range(6) for i in stream], stream),
        "label.weight": (range(11), stream),
        "final.adaln.weight": ([*stream, *(32 + i for i in stream)], stream),
        "final.linear.weight": (range(4), stream),
    }
    state = model.state_dict()
    for name, (rows, columns) in by_hand.items():
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                assert state[name][i, j] == theirs[name][row, column], (name, i, j)
    assert torch.equal(state["blocks.0.qkv.bias"], theirs["blocks.0.qkv.bias"][by_hand["blocks.1.qkv.weight"][0]])
    assert model(*inputs(arch)).isfinite().all()


def test_layers_are_the_first_and_equal_widths_are_a_copy(parent, generator):
    model = method().descend(parent, tiny_arch(num_layers=3), generator).model
    theirs = parent.module.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_the_authors_rule_takes_every_axis_by_itself(parent, generator):
    model = method(rows="whole").descend(parent, tiny_arch(**SMALL), generator).model
    theirs = parent.module.blocks[0].qkv.weight
    assert torch.equal(model.blocks[0].qkv.weight, theirs[0:96:2][:, 0:32:2])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_layers": 5}, "num_layers is 4 in the parent, 5 in the target"),
        ({"hidden_size": 64}, "hidden_size is 32 in the parent, 64"),
        ({"num_heads": 2}, "a head has 8 units in the parent, 16 in the target; give the target more heads"),
    ],
)
def test_a_larger_target_is_refused(fields, words, parent):
    with pytest.raises(ArtifactError, match=words):
        check(method(), parent.artifact, tiny_arch(**fields))
