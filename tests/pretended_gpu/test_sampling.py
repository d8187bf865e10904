"""Images on a GPU are drawn in the arithmetic that the protocol says; the host waits once a batch, not once a step."""

from __future__ import annotations

import pytest

from tests.pretended_gpu.worker import Worker

ARITHMETIC = {
    "fp32": {"torch.float32 highest"},
    "tf32": {"torch.float32 high"},
    "bf16": {"torch.bfloat16 highest"},
}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_products_of_a_sampler_are_of_the_precision_that_is_asked_for(gpu: Worker, precision: str) -> None:
    found = gpu.run("sampling", scheduler="ddim", guidance=4.0, precision=precision)
    assert set(found["products"]) == ARITHMETIC[precision]


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_more_steps_of_a_sampler_wait_no_more_often(gpu: Worker, scheduler: str) -> None:
    """DDPM's ancestral steps do: their noise is the host's, so that an image depends on its own seed alone."""
    few, many = (gpu.run("sampling", scheduler=scheduler, steps=steps)["waits"] for steps in (4, 8))
    assert sum(many.values()) == sum(few.values()), many
