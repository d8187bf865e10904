"""A step of the loop on a GPU: what it launches, what it waits for, what it multiplies in, and what it holds."""

from __future__ import annotations

import pytest

from fine_dist.core.processes import free_port, rank_environment
from tests.pretended_gpu.worker import Worker

LAUNCHES_A_LAYER = {"dense": 80, "joint": 135, "sigma": 96}
"""Measured 77, 131 and 93 in eager mode, bf16, forward and backward: a fused operator that is lost shows here."""
CASTS_A_LAYER = 12
"""Of a dense layer: its condition, its modulation, what enters and leaves the residual stream; each there and back."""


@pytest.mark.parametrize("kind", ["dense", "joint", "sigma"])
def test_a_step_waits_for_nothing_and_a_layer_costs_so_many_launches(gpu: Worker, kind: str) -> None:
    found = [gpu.run("loop_step", kind=kind, layers=layers, precision="bf16") for layers in (1, 2)]
    for step in found:
        assert step["waits"] == []
        assert {key.split()[0] for key in step["products"]} == {"torch.bfloat16"}
    launches = [sum(step["launches"].values()) for step in found]
    assert launches[1] - launches[0] <= LAUNCHES_A_LAYER[kind]
    if kind == "dense":
        assert found[1]["casts"] - found[0]["casts"] <= CASTS_A_LAYER


def test_a_bf16_residual_stream_is_not_cast_on_the_way_to_products(gpu: Worker) -> None:
    layers = [gpu.run("loop_step", kind="dense", layers=n, precision="bf16", residual_dtype="bf16") for n in (1, 2)]
    assert layers[1]["casts"] - layers[0]["casts"] <= 2  # the condition's, there and back


@pytest.mark.parametrize(("precision", "products"), [("fp32", "torch.float32 highest"), ("tf32", "torch.float32 high")])
def test_products_of_a_step_are_exact_unless_tf32_is_said(gpu: Worker, precision: str, products: str) -> None:
    found = gpu.run("loop_step", kind="dense", layers=1, precision=precision)
    assert set(found["products"]) == {products} and found["waits"] == []


def test_a_save_waits_twice_whatever_the_number_of_its_tensors(gpu: Worker) -> None:
    """Once for the counts of updates and once for all copies, which go to page-locked memory."""
    found = gpu.run("save_of_a_run", layers=3)
    assert len(found["waits"]) <= 2 and found["copies"] > 100, found


def test_zero_waits_for_its_own_overflow_check_alone(gpu: Worker) -> None:
    found = gpu.run("loop_step", kind="dense", layers=1, backend="deepspeed", deepspeed={"stage": 2})
    assert found["waits"] and all("deepspeed_backend.py" in wait or "synchronize" in wait for wait in found["waits"])


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("dense", {"precision": "fp32"}),
        ("dense", {"precision": "bf16"}),
        ("dense", {"precision": "bf16", "activation_checkpointing": "blocks"}),
        ("dense", {"precision": "bf16", "residual_dtype": "bf16"}),
        ("joint", {"precision": "bf16"}),
        ("sigma", {"precision": "bf16"}),
        ("sigma", {"precision": "fp32"}),
    ],
)
def test_the_peak_of_a_run_is_within_15_percent_of_the_estimate(gpu: Worker, kind: str, engine: dict) -> None:
    found = gpu.run("peak_memory", kind=kind, arch="DiT-S/2-L4", batch=16, **engine)
    assert found["peak"] == pytest.approx(found["estimate"], rel=0.15)


@pytest.mark.distributed
def test_collectives_of_two_ranks_stay_on_one_kind_of_device_and_gradients_never_visit_the_host(gpu, tmp_path) -> None:
    """Real ranks meet over gloo; on a GPU the same calls go to NCCL by the device of their tensors."""
    port = free_port()
    ranks = [Worker(rank_environment(rank, 2, rank, 2, "127.0.0.1", port)) for rank in range(2)]
    try:
        for rank in ranks:
            rank.start("loop_of_two_ranks", folder=str(tmp_path))
        answers = [rank.answer() for rank in ranks]
    finally:
        for rank in ranks:
            rank.close()
    assert [answer["device"] for answer in answers] == ["cuda:0", "cuda:1"]
    for answer in answers:
        assert answer["mixed"] == []
        of_a_step = ("gradient_buckets.py", "plain_backend.py", "step_result.py")
        assert not [call for call in answer["host"] if any(file in call for file in of_a_step)]
        assert answer["device_bytes"] > 4 * answer["gradient_bytes"]  # a sum over ranks in each of four steps
