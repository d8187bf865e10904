"""Peak FLOP/s of known accelerators, which model FLOPs utilization (MFU) is computed from."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import torch

from fine_dist.engine.settings import LoopConfig

log = logging.getLogger(__name__)


class Peak(NamedTuple):
    """Dense peak TFLOP/s of one device, without structured sparsity and with fp32 accumulation; None: unsupported."""

    fp32: float
    tf32: float | None
    bf16: float | None


_H100, _H100_PCIE, _H100_NVL = Peak(66.9, 494.7, 989.4), Peak(51.2, 378.0, 756.0), Peak(60.0, 417.5, 835.5)
_A100, _V100, _MI300 = Peak(19.5, 156.0, 312.0), Peak(15.7, None, None), Peak(163.4, 653.7, 1307.4)

PEAKS: dict[str, Peak] = {
    # NVIDIA data sheets "B200/GB200 (HGX, NVL72)" and "B300/GB300"; halves of the figures with sparsity
    "NVIDIA B200": Peak(75.0, 1100.0, 2250.0),
    "NVIDIA B300 SXM6 AC": Peak(75.0, 1100.0, 2250.0),
    "NVIDIA GB200": Peak(80.0, 1250.0, 2500.0),
    "NVIDIA GB300": Peak(80.0, 1250.0, 2500.0),
    # NVIDIA data sheets "H100", "H200", "GH200", "H800", "H20"
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H200": _H100,
    "NVIDIA H200 NVL": _H100_NVL,
    "NVIDIA GH200 120GB": _H100,
    "NVIDIA GH200 480GB": _H100,
    "NVIDIA H800": _H100,
    "NVIDIA H800 PCIe": _H100_PCIE,
    "NVIDIA H20": Peak(44.0, 74.0, 148.0),
    # NVIDIA data sheets "A100", "A800", "A40", "A30", "A10"; AWS' G5 page for A10G
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A800-SXM4-80GB": _A100,
    "NVIDIA A800 80GB PCIe": _A100,
    "NVIDIA A40": Peak(37.4, 74.8, 149.7),
    "NVIDIA A30": Peak(10.3, 82.0, 165.0),
    "NVIDIA A10": Peak(31.2, 62.5, 125.0),
    "NVIDIA A10G": Peak(31.5, 35.0, 70.0),
    # NVIDIA data sheets "L40S", "L40", "L4"
    "NVIDIA L40S": Peak(91.6, 183.0, 362.05),
    "NVIDIA L40": Peak(90.5, 90.5, 181.05),
    "NVIDIA L4": Peak(30.3, 60.0, 121.0),
    # NVIDIA architecture papers "Ampere GA102", "Ada", "RTX Blackwell": products with fp32 sums
    "NVIDIA GeForce RTX 3090": Peak(35.6, 35.6, 71.0),
    "NVIDIA GeForce RTX 4090": Peak(82.6, 82.6, 165.2),
    "NVIDIA GeForce RTX 5090": Peak(104.8, 104.8, 209.5),
    # NVIDIA data sheets "RTX A6000", "RTX A5000", "RTX A4000", "RTX 6000 Ada Generation"
    "NVIDIA RTX A6000": Peak(38.7, 77.4, 154.8),
    "NVIDIA RTX A5000": Peak(27.8, 55.6, 111.1),
    "NVIDIA RTX A4000": Peak(19.2, 38.3, 76.7),
    "NVIDIA RTX 6000 Ada Generation": Peak(91.1, 182.1, 364.2),
    # NVIDIA data sheets "V100" and "T4": their tensor cores take fp16 alone
    "Tesla V100-SXM2-16GB": _V100,
    "Tesla V100-SXM2-32GB": _V100,
    "Tesla V100-PCIE-16GB": Peak(14.0, None, None),
    "Tesla V100-PCIE-32GB": Peak(14.0, None, None),
    "Tesla T4": Peak(8.1, None, None),
    # AMD data sheets "Instinct MI210 ... MI355X"; of MI250 and MI250X torch sees each half as a device
    "AMD Instinct MI210": Peak(45.3, None, 181.0),
    "AMD Instinct MI250": Peak(45.3, None, 181.0),
    "AMD Instinct MI250X": Peak(47.9, None, 191.5),
    "AMD Instinct MI300A": Peak(122.6, 490.3, 980.6),
    "AMD Instinct MI300X": _MI300,
    "AMD Instinct MI325X": _MI300,
    "AMD Instinct MI355X": Peak(157.3, None, 2516.6),
}
"""Peaks by the driver's exact device name: `RTX A4000` is not `A40`, and a MIG slice has another name."""


def peak_flops(device: torch.device, precision: str, stated_tflops: float | None = None) -> float | None:
    """Peak of one device in FLOP/s.

    Args:
        device: The device.
        precision: `fp32`, `tf32` or `bf16`.
        stated_tflops: The peak in the config, which takes precedence.

    Returns:
        The stated peak, the peak in the table, or for a CPU a measured one; None if the device is unknown.
    """
    if stated_tflops is not None:
        return stated_tflops * 1e12
    if device.type == "cpu":
        return measured_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    # No guess for an unknown device, because an MFU with a wrong peak cannot be recognized as wrong.
    peak = PEAKS.get(torch.cuda.get_device_name(device))
    tflops = None if peak is None else getattr(peak, precision)
    return None if tflops is None else tflops * 1e12


def known_peak(device: torch.device, engine: LoopConfig) -> float | None:
    """`peak_flops` for a run's settings, in FLOP/s; logs a warning when the peak is unknown."""
    peak = peak_flops(device, engine.precision, engine.peak_tflops)
    if peak is None:
        log.warning(
            "the peak of %s in %s is not known, so rows have no MFU; give it as engine.peak_tflops",
            torch.cuda.get_device_name(device),
            engine.precision,
        )
    return peak


def measured_peak(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Best FLOP/s of a square matrix product on this CPU within `seconds`, with torch's current number of threads."""
    n = 768
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    a @ b
    # The first product is not timed, because it also starts threads and allocates buffers.
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        a @ b
        # The best and not the mean, because other processes only make a product slower.
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 products are emulated on this device, many times slower than fp32, as on a CPU without AVX-512."""
    if device.type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
