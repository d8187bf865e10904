"""The device of the GPU's tests, whose bodies know no device: `FINE_DIST_GPU_TESTS=cpu` runs them without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from fine_dist.engine import dist
from fine_dist.engine.world import World
from tests.family.conftest import learngene, shards

__all__ = ["here", "learngene", "shards"]

ASKED = os.environ.get("FINE_DIST_GPU_TESTS", "cuda")


@pytest.fixture
def here() -> World:
    """This process alone on the device that is asked for; no test runs where it is not there."""
    if ASKED not in ("cpu", "cuda"):
        pytest.fail(f"FINE_DIST_GPU_TESTS={ASKED}; legal: cpu, cuda")
    if ASKED == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is at hand; FINE_DIST_GPU_TESTS=cpu runs this test on the CPU")
    return dist.single_process(ASKED)
