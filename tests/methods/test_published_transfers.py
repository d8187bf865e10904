"""The published configs of stitched, growing and transfer methods: what they would train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fine_dist.core.config import load
from fine_dist.family.config import InitConfig
from fine_dist.family.members import expand
from fine_dist.methods import build, check
from fine_dist.methods.base import Parent, Weights
from fine_dist.methods.stitching.pool import all_routes
from fine_dist.model.arch import arch as named
from fine_dist.model.artifact import Artifact
from fine_dist.model.dit import DiT
from fine_dist.planning.estimates import dry_run
from fine_dist.stages.condense import CondenseStage
from fine_dist.stages.settings import CondenseConfig

ANCHORS = [{"hidden_size": 192, "num_heads": 3}, {"hidden_size": 384, "num_heads": 6}, {}]


@pytest.mark.parametrize(
    ("name", "depth", "maps", "weights", "routes"),
    [
        # maps: 6 from the narrow anchor and 2 from each wider one, to a width of 768, with biases
        ("learngene_pool_b", 6, 768 * (6 * 193 + 2 * 385 + 2 * 769), Weights(0.1, 0.9, 1.8), 3 + 2 * 16),
        ("snnet_b", 9, 0, Weights(), 3 + 2 * 25),
    ],
)
def test_stage_1_of_a_pool_is_its_anchors_and_their_maps(name, depth, maps, weights, routes):
    stage = CondenseStage(load(CondenseConfig, f"configs/condense/{name}.yaml"))
    plan = stage.blueprint()
    numbers = sum(named("DiT-B/2", num_layers=depth, **fields).count() for fields in ANCHORS) + maps
    assert f"model: DiT-B/2-L{depth}, {numbers:,} parameters" in "\n".join(dry_run(stage.config, plan))
    assert stage.weights == weights and stage.imitates == bool(weights.output)
    assert len(all_routes(3, depth)) == routes


@pytest.mark.parametrize(
    ("name", "lr"), [("stitched_b", 5e-5), ("difffit_xl", 1e-3), ("difffit_xl_512", 1e-4), ("ligo_b_to_l", 2e-4)]
)
def test_stage_2_has_its_papers_learning_rate_and_one_target(name, lr):
    config = load(InitConfig, f"configs/init/{name}.yaml")
    [member] = expand(config)
    assert member.lr == lr


def test_at_512_pixels_difffit_trains_the_numbers_it_trains_at_256_on_positions_of_the_small_grid():
    config = load(InitConfig, "configs/init/difffit_xl_512.yaml")
    method, small = build(config.method), named("DiT-XL/2")
    large = method.shape_of(config.arch, small)
    assert (large.num_tokens, large.position_grid) == (1024, 16)
    weights = {"blocks.0.qkv.weight": torch.zeros(1)}
    parent = Artifact(Path("dit_xl_2"), "model", {"name": "scratch"}, small, weights, {}, "")
    check(method, parent, large)
    with torch.device("meta"):
        source = Parent(parent, DiT(small))
        trained = [
            sum(
                p.numel()
                for p in method.descend(source, shape, torch.Generator()).model.parameters()
                if p.requires_grad
            )
            for shape in (small, large)
        ]
    assert trained[0] == trained[1] < 0.003 * small.count()  # 0.08%, and the labels of 1,000 classes
