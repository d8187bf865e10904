"""The pretended GPU tells waits, copies and mixtures apart, and counts what is held."""

from __future__ import annotations

import pytest

from tests.pretended_gpu.worker import Worker


@pytest.fixture(scope="module")
def found(gpu: Worker) -> dict:
    return gpu.run("operators")


@pytest.mark.parametrize(
    "what", ["nothing but work", "backward", "pinned copy", "pinned copy to the host", "event behind work"]
)
def test_work_and_asynchronous_copies_are_no_waits(found, what):
    assert found[what] == []


@pytest.mark.parametrize("what", ["item", "bool", "list index", "pageable copy", "copy to the host", "event at once"])
def test_whatever_makes_the_host_stand_still_is_a_wait(found, what):
    assert len(found[what]) == 1


def test_tensors_of_two_devices_in_one_operator_are_refused(found):
    assert "Expected all tensors to be on the same device" in found["mixture"]


def test_memory_is_counted_while_it_is_held(found):
    assert found["held"] == 2**20 and found["released"] == 0


def test_forward_and_backward_of_a_product_launch_three(found):
    assert found["launches of a product"] == 3
