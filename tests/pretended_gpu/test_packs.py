"""A step of a pack on a GPU: the host waits for nothing, and its launches do not depend on the number of its jobs."""

from __future__ import annotations

import pytest

from tests.pretended_gpu.worker import Worker


def test_launches_of_a_step_do_not_grow_with_the_jobs_or_their_seeds(gpu: Worker) -> None:
    two = gpu.run("pack_step", depths=[2, 4])["launches"]
    twelve = gpu.run("pack_step", depths=[2, 4] * 6, seeds=[0, 1, 2] * 4)["launches"]
    assert twelve <= 1.02 * two


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_in_a_step_waits_for_the_device(gpu: Worker, precision: str) -> None:
    step = gpu.run("pack_step", depths=[2, 4, 4], seeds=[0, 0, 1], precision=precision)
    assert step["waits"] == []
    assert step["launches"] <= 105 * 4 + 60 + (25 * 4 if precision == "bf16" else 0)  # of four layers, and around them
