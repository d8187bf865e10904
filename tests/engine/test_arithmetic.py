"""What fp32 means, which peak MFU is held against, and what the deterministic setting turns on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fine_dist.engine.accelerators import PEAKS, peak_flops
from tests.engine.toy import ToyConfig, engine, toy_fit

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def arithmetic_stays() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA RTX A4000", "bf16", 76.7),  # no A40
        ("NVIDIA A10G", "bf16", 70.0),  # no A10
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA T400 4GB", "bf16", None),  # no T4
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),  # a seventh of one
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_a_peak_is_that_of_the_exact_name_or_unknown(
    monkeypatch, name: str, precision: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(GPU, precision)
    assert found == (None if tflops is None else pytest.approx(tflops * 1e12))
    assert peak_flops(GPU, precision, stated_tflops=3.0) == 3e12


def test_every_peak_grows_from_fp32_to_bf16() -> None:
    for peak in PEAKS.values():
        figures = [figure for figure in peak if figure is not None]
        assert figures == sorted(figures)


@pytest.mark.parametrize(("precision", "products"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "highest")])
def test_fp32_is_exact_unless_tf32_is_said(tmp_path: Path, precision: str, products: str) -> None:
    toy_fit(tmp_path, ToyConfig(steps=1, engine=engine(precision=precision)))
    assert torch.get_float32_matmul_precision() == products
    assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")


def test_a_deterministic_run_asks_torch_and_cublas_for_it_and_computes_the_same(tmp_path: Path) -> None:
    free = toy_fit(tmp_path / "free", ToyConfig(kind="joint", steps=3))
    assert not torch.are_deterministic_algorithms_enabled()
    fixed = toy_fit(tmp_path / "fixed", ToyConfig(kind="joint", steps=3, engine=engine(deterministic=True)))
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    losses = [[row["loss"] for row in fitted.rows] for fitted in (free, fixed)]
    assert losses[0] == losses[1]  # on a CPU every run gives the same bits
