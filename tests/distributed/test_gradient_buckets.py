"""Gradients that are summed while the backward pass runs are those of one all-reduce after it."""

from __future__ import annotations

import pytest
import torch

from fine_dist.engine import dist
from fine_dist.engine.gradient_buckets import GradientBuckets
from fine_dist.testing import run_distributed
from tests.conftest import inputs, lively, tiny_arch

pytestmark = pytest.mark.distributed


def summed(bucket_bytes: int, dtype: str) -> tuple[float, float, int, int]:
    """(largest difference to a plain sum, largest value, buckets sent before the backward pass ended, buckets)."""
    from fine_dist.model.dit import DiT

    world = dist.world("cpu")
    arch = tiny_arch(num_layers=3)
    model = lively(DiT(arch))
    parameters = list(model.parameters())
    unused = torch.nn.Parameter(torch.ones(7))  # on every rank, and one more that rank 1 alone uses
    rarely = torch.nn.Parameter(torch.ones(5))
    parameters[3:3] = [unused, rarely]

    def loss(part: int) -> torch.Tensor:
        out = model(*inputs(arch, 3, seed=10 * world.rank + part)).square().mean()
        return out + (rarely.sum() if world.rank else 0.0)

    for part in (0, 1):
        loss(part).backward()
    plain = [dist.all_reduce_sum(torch.zeros_like(p) if p.grad is None else p.grad.clone(), world) for p in parameters]
    buckets = GradientBuckets(parameters, getattr(torch, dtype), bucket_bytes)
    loss(0).backward()
    assert buckets._next == 0  # nothing is sent before the last micro-batch
    buckets.start()
    loss(1).backward()
    early = buckets._next
    buckets.send_rest()
    buckets.wait()
    difference = max(float((p.grad - g).abs().max()) for p, g in zip(parameters, plain))
    size = max(float(g.abs().max()) for g in plain)
    buckets.zero()
    assert all(not p.grad.any() for p in parameters)
    return difference, size, early, len(buckets.buckets)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_sums_are_those_of_one_all_reduce_and_leave_before_the_backward_pass_ends(dtype: str, tolerance: float) -> None:
    for difference, size, early, count in run_distributed(summed, 2, 20_000, dtype):
        assert difference <= tolerance * size
        assert count > 4 and early > count // 2  # the layers behind the unused parameters are sent on the way


def test_one_bucket_holds_all_when_it_is_large_enough() -> None:
    for difference, size, _, count in run_distributed(summed, 2, 2**30, "float32"):
        assert count == 1 and difference <= 1e-6 * size
