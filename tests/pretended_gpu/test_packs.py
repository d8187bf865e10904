"""A step of a pack on a GPU: its launches do not depend on the number of its jobs."""

from __future__ import annotations

from tests.pretended_gpu.worker import Worker


def test_launches_of_a_step_do_not_grow_with_the_jobs(gpu: Worker) -> None:
    two, twelve = (gpu.run("pack_step", depths=[2, 4] * times)["launches"] for times in (1, 6))
    assert twelve <= 1.1 * two
