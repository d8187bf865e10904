"""SWS: which layer takes which stage, what is shared, and what is stored."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ConfigError
from fine_dist.methods import build, from_manifest
from fine_dist.methods.settings import SwsConfig
from fine_dist.methods.sws import layers_of, stages_of
from fine_dist.model.arch import MATRICES, arch
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import artifact_for, condensed, parent_for, tiny


def test_twelve_layers_take_five_stages_as_3_3_2_2_2():
    assert stages_of(12, 5) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("depth", range(1, 20))
def test_stages_never_fall_and_are_all_used_where_there_are_layers_enough(depth):
    stages = stages_of(depth, 5)
    assert len(stages) == depth and stages == sorted(stages)
    assert len(set(stages)) == min(depth, 5)
    counts = [stages.count(stage) for stage in range(5)]
    if depth >= 5:
        assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


def test_the_auxiliary_model_has_16_layers_in_stages_of_3_3_4_3_3_whatever_arch_says():
    method = build(SwsConfig())
    assert method.auxiliary(tiny_arch(num_layers=28)).num_layers == 16
    assert layers_of(method.config.stages) == [0] * 3 + [1] * 3 + [2] * 4 + [3] * 3 + [4] * 3


def test_a_target_repeats_its_stages_block(generator):
    learngene = artifact_for("sws").tensors
    state = tiny("sws").descend(parent_for("sws"), tiny_arch(num_layers=4), generator).model.state_dict()
    for matrix in MATRICES:
        for layer, stage in enumerate([0, 0, 1, 2]):
            for part in ("weight", "bias"):
                assert torch.equal(
                    state[f"blocks.{layer}.{matrix}.{part}"], learngene[f"genes.{matrix}.{stage}.{part}"]
                )


def test_the_auxiliary_model_is_the_stages_blocks_one_after_the_other():
    _, model = condensed(tiny("sws"))
    lively(model)
    batch = inputs(model.arch)
    x, condition = model.embed(*batch)
    first, second, third = model.blocks[0], model.blocks[1], model.blocks[3]  # stages of 1, 2 and 1 layers
    for block in (first, second, second, third):
        x = block(x, condition)
    assert torch.equal(model.unpatchify(model.final(x, condition.c)), model(*batch))


def test_with_one_stage_every_layer_is_the_same(generator):
    share = tiny("sws", stages=(4,))
    _, model = condensed(share)
    state = share.merge(lively(model))
    assert all(torch.equal(state[f"blocks.{layer}.qkv.weight"], state["blocks.0.qkv.weight"]) for layer in range(4))


@pytest.mark.parametrize(("name", "millions"), [("DiT-B/2", 55.9), ("DiT-L/2", 98.9)])
def test_what_is_stored_is_a_block_a_stage_and_the_rest(name, millions):
    method, a = build(SwsConfig()), arch(name)
    with torch.device("meta"):
        module = method.blueprint(a)
    d = a.hidden_size
    outside = a.with_depth(1).count() - (18 * d * d + 15 * d)
    assert method.cost(module).stored == 5 * (18 * d * d + 15 * d) + outside
    assert method.cost(module).stored / 1e6 == pytest.approx(millions, abs=0.05)


def test_impossible_stages_are_refused():
    with pytest.raises(ConfigError, match="stages"):
        from_manifest({"name": "sws", "stages": []})
    with pytest.raises(ConfigError, match="stages"):
        from_manifest({"name": "sws", "stages": [3, 0]})
