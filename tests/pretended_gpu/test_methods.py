"""Every method's stages run on a GPU in bf16, and wait for nothing."""

from __future__ import annotations

import pytest

from fine_dist.methods import METHODS
from tests.methods import making
from tests.pretended_gpu.worker import Worker

STAGES = [(name, stage) for name in METHODS for stage in (1, 2) if stage == 2 or making.tiny(name).traits.condenses]


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_step_of_a_stage_waits_for_nothing(gpu: Worker, name: str, stage: int) -> None:
    found = gpu.run("method_stage", name=name, stage=stage)
    assert found["waits"] == [] and found["launches"] > 0
