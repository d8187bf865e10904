"""The device that estimates assume: one that `--for` names, or the one that the job will use as far as is known."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.limits import GIB, num_cores
from fine_dist.core.settings import LaunchConfig
from fine_dist.engine.settings import EngineConfig

UTILIZATION = 0.4
"""Assumed share of an accelerator's peak that training reaches (MFU)."""
ASSUMED_TFLOPS = 120.0
"""Assumed training rate of an accelerator of unknown kind, in TFLOP/s: about that of an A100 in bf16."""
CORE_GFLOPS = 40.0
"""Assumed rate of one CPU core, in GFLOP/s of fp32."""
UNKNOWN = "A100"
"""Accelerator that is assumed where none is known."""
ACCELERATORS: dict[str, tuple[str, int]] = {
    "A10": ("NVIDIA A10", 24), "A30": ("NVIDIA A30", 24), "A40": ("NVIDIA A40", 48),
    "A100": ("NVIDIA A100-SXM4-80GB", 80), "A800": ("NVIDIA A800-SXM4-80GB", 80), "B200": ("NVIDIA B200", 180),
    "GB200": ("NVIDIA GB200", 186), "GH200": ("NVIDIA GH200 120GB", 96), "H100": ("NVIDIA H100 80GB HBM3", 80),
    "H100 NVL": ("NVIDIA H100 NVL", 94), "H100 PCIe": ("NVIDIA H100 PCIe", 80), "H20": ("NVIDIA H20", 96),
    "H200": ("NVIDIA H200", 141), "H200 NVL": ("NVIDIA H200 NVL", 141), "H800": ("NVIDIA H800", 80),
    "L4": ("NVIDIA L4", 24), "L40": ("NVIDIA L40", 48), "L40S": ("NVIDIA L40S", 48),
    "MI300X": ("AMD Instinct MI300X", 192), "RTX 3090": ("NVIDIA GeForce RTX 3090", 24),
    "RTX 4090": ("NVIDIA GeForce RTX 4090", 24), "RTX 5090": ("NVIDIA GeForce RTX 5090", 32),
    "RTX 6000 Ada": ("NVIDIA RTX 6000 Ada Generation", 48), "T4": ("Tesla T4", 16),
    "V100": ("Tesla V100-SXM2-32GB", 32),
}  # fmt: skip
"""By the name that `--for` takes: the driver's name, whose peak `engine.accelerators` knows, and the memory in GiB of
the largest common variant."""


@dataclass(frozen=True)
class DeviceModel:
    """The device of one process, as estimates assume it."""

    name: str
    """What it is, for messages: `an H100`, `8 CPU cores`."""
    flops_per_s: float
    """Training rate of one process in FLOP/s."""
    accelerator: bool
    """Whether it is an accelerator, and not CPU cores."""
    memory_bytes: float | None = None
    """Memory of the accelerator in bytes. None: unknown, or there is none."""

    @property
    def rate(self) -> str:
        """The rate in words: `124.8 TFLOP/s (an A100 at 40% of its peak)`."""
        share = f" at {UTILIZATION:.0%} of its peak" if self.accelerator else ""
        return f"{self.flops_per_s / 1e12:.3g} TFLOP/s ({self.name}{share})"


def device_for(wish: str | None, launch: LaunchConfig, engine: EngineConfig | None = None) -> DeviceModel:
    """The device that one process of a job will use.

    Args:
        wish: Value of `--for`: `gpu:h100`, `cpu` or `cpu:16`. None: by the settings. A job that asks for accelerators
            gets this machine's if it has one, else an A100 is assumed; any other job uses the CPU, or this machine's
            accelerator where there is one.
        launch: The `launch` settings of the job.
        engine: The `engine` settings of a stage that trains.

    Raises:
        ConfigError: `--for` names no known device.
    """
    precision = engine.precision if engine else "bf16"
    kind, _, name = (wish or "").partition(":")
    if wish is not None and kind not in ("gpu", "cpu"):
        raise ConfigError(f"--for {wish!r}: no such kind of device; legal: gpu:NAME, such as gpu:h100, cpu, cpu:CORES")
    if kind == "gpu":
        return _accelerator(_known(name), precision)
    if kind == "cpu":
        if name and not (name.isascii() and name.isdecimal() and int(name) > 0):
            raise ConfigError(f"--for {wish!r}: a number of cores is needed after cpu: (got {name!r})")
        return _cores(int(name) if name else num_cores())
    if not launch.gpus and engine is not None and engine.device == "cpu":
        return _cores(engine.threads or num_cores())
    here = _here()
    if here is not None:
        return _accelerator(here, precision)
    if launch.gpus or (engine is not None and engine.device == "cuda"):
        return _accelerator(UNKNOWN, precision)
    return _cores((engine.threads if engine else None) or max(launch.cpus, num_cores()))


def _cores(count: int) -> DeviceModel:
    name = f"{count} CPU cores at {CORE_GFLOPS:g} GFLOP/s" if count > 1 else f"a CPU core at {CORE_GFLOPS:g} GFLOP/s"
    return DeviceModel(name, count * CORE_GFLOPS * 1e9, accelerator=False)


def _accelerator(name: str, precision: str) -> DeviceModel:
    from fine_dist.engine.accelerators import PEAKS

    driver, memory = ACCELERATORS[name]
    peak = getattr(PEAKS[driver], precision) or PEAKS[driver].fp32  # one without bf16 computes such a run in fp32
    article = "an" if name[0] in "AHLMR" else "a"
    return DeviceModel(f"{article} {name}", UTILIZATION * peak * 1e12, True, memory * GIB)


def _known(name: str) -> str:
    """The table's name of an accelerator, whatever its case and punctuation."""
    plain = {_plain(known): known for known in ACCELERATORS}
    if _plain(name) not in plain:
        raise ConfigError(f"--for gpu:{name}: no such accelerator is known; {nearest(name.upper(), ACCELERATORS)}")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _here() -> str | None:
    """The table's name of this machine's accelerator, the assumed one where the table has it not, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    driver = torch.cuda.get_device_name()
    return next((name for name, (known, _) in ACCELERATORS.items() if known == driver), UNKNOWN)
