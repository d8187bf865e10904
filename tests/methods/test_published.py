"""The published configs of stage 1 are dry-run: what they would train, and from what."""

from __future__ import annotations

import pytest

from fine_dist.core.config import load
from fine_dist.methods.base import Weights
from fine_dist.planning.estimates import dry_run
from fine_dist.stages.condense import CondenseStage
from fine_dist.stages.settings import CondenseConfig


@pytest.mark.parametrize(
    ("name", "depth", "numbers", "weights"),
    [
        ("tleg_b", 12, 24_032_288, Weights(0, 1)),
        ("sws_b", 16, 55_917_344, Weights(0, 1)),
        ("wave_b", 12, 13_770_272, Weights(1, 1)),
        ("sweet_b", 12, 18_254_432, Weights(1, 0)),
        ("kind_b", 12, 158_664_224, Weights(1, 0)),
    ],
)
def test_a_published_config_says_what_it_would_train(name, depth, numbers, weights):
    stage = CondenseStage(load(CondenseConfig, f"configs/condense/{name}.yaml"))
    plan = stage.blueprint()
    text = "\n".join(dry_run(stage.config, plan))
    assert f"model: DiT-B/2-L{depth}, {numbers:,} parameters" in text
    assert stage.weights == weights and stage.imitates == bool(weights.output)
    assert "dry run: nothing was done" in text and "GiB" in text
    assert (plan.teacher is not None) == stage.imitates
