"""Counted arithmetic against the papers' figures and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fine_dist.engine.accelerators import measured_peak
from fine_dist.engine.monitor import mfu
from fine_dist.model.arch import arch
from fine_dist.model.dit import DiT
from fine_dist.model.flops import block_macs, factored_macs, forward_macs, train_flops

# DiT, arXiv 2212.09748, table 4: multiply-adds of a forward pass (the paper's Gflops), 256 px.
PAPER = {"DiT-S/2": 6.06, "DiT-B/2": 23.01, "DiT-L/2": 80.71, "DiT-XL/2": 118.64, "DiT-B/4": 5.56, "DiT-XL/8": 7.39}
TOKEN_MATRICES = ("qkv", "o", "in", "out")


@pytest.mark.parametrize("name", PAPER)
def test_forward_passes_cost_what_the_paper_says(name: str) -> None:
    assert forward_macs(arch(name)) / 1e9 == pytest.approx(PAPER[name], rel=0.01)


def test_kinds_saving_at_dit_l_is_the_papers_35_4_gflops_at_416_active_components() -> None:
    large = arch("DiT-L/2")
    dense = block_macs(large, TOKEN_MATRICES)
    assert dense / 1e9 == pytest.approx(77.31, abs=0.005)
    assert factored_macs(large, 1, TOKEN_MATRICES) / 1e9 == pytest.approx(0.10066, abs=5e-6)
    assert (dense - factored_macs(large, 416, TOKEN_MATRICES)) / 1e9 == pytest.approx(35.4, abs=0.05)


def test_a_training_step_is_counted_as_torch_counts_it() -> None:
    small = arch("DiT-S/2-L2")
    model = DiT(small)

    def products(x: tuple[int, int], weight: tuple[int, int], *_: object, out_shape: object = None) -> int:
        return 2 * x[0] * x[1] * weight[0]

    # torch has no formula for the product that oneDNN makes on a CPU.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: products})
    with counter, sdpa_kernel(SDPBackend.MATH):  # it counts products, not the fused attention of a CPU
        z = torch.randn(2, *small.latent_shape)
        model(z, torch.tensor([1, 2]), torch.tensor([1, 2])).sum().backward()
    # It leaves out the gradient of the first layers' inputs, which nobody needs.
    assert counter.get_total_flops() / 2 == pytest.approx(train_flops(small), rel=0.002)


def test_mfu_is_the_models_arithmetic_over_all_accelerators_peak() -> None:
    assert mfu(images_per_s=100, flops_per_sample=2e12, peak=1e15, world_size=2) == pytest.approx(0.1)
    assert mfu(images_per_s=100, flops_per_sample=2e12, peak=None, world_size=2) is None
    assert measured_peak(torch.float32, seconds=0.05) > 1e9
