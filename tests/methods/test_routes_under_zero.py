"""A pool whose steps each train another part: two processes under ZeRO compute what one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fine_dist.data.settings import DataConfig
from fine_dist.engine.settings import DeepSpeedConfig, EngineConfig, OptimConfig
from fine_dist.methods import METHODS
from fine_dist.model.artifact import load_artifact
from fine_dist.stages.condense import run
from fine_dist.stages.settings import CondenseConfig
from fine_dist.testing import run_distributed
from tests.conftest import tiny_arch

pytestmark = pytest.mark.distributed


def condense(folder: str, shards: str, stages: tuple[int | None, ...]) -> list[str]:
    """The learngenes of one run for each ZeRO stage; none: the plain backend."""
    return [
        str(
            run(
                CondenseConfig(
                    run_dir=f"{folder}/{stage}",
                    arch=tiny_arch(num_layers=2),
                    method=METHODS["snnet"].Config(name="snnet", widths=(0.5, 1.0)),
                    steps=6,
                    batch=8,
                    # as in tests/distributed: a larger eps keeps rounding noise of gradients that are zero out of it
                    optim=OptimConfig(lr=1e-3, eps=1e-4),
                    data=DataConfig(shards=shards),
                    engine=EngineConfig(
                        device="cpu",
                        threads=1,
                        backend="plain" if stage is None else "deepspeed",
                        deepspeed=DeepSpeedConfig(stage=stage or 0),
                        preview_every=10**9,
                    ),
                )
            )
        )
        for stage in stages
    ]


def test_random_anchors_train_alike_on_one_process_and_on_two_under_zero_2_and_3(digit_shards, tmp_path: Path):
    shards = str(digit_shards / "train")
    [alone] = condense(str(tmp_path / "one"), shards, (None,))
    single = load_artifact(alone).tensors
    for folder in run_distributed(condense, 2, str(tmp_path / "two"), shards, (2, 3))[0]:
        for key, tensor in load_artifact(folder).tensors.items():
            # two orders of summing eight samples' gradients in fp32, over six steps
            assert float((tensor - single[key]).norm()) <= 1e-5 * max(float(single[key].norm()), 1e-3), (folder, key)
