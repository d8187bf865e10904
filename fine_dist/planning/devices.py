"""The device that estimates assume: the one that `--for` names, else the one that the job will most likely use."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.limits import GIB, num_cores
from fine_dist.core.settings import LaunchConfig
from fine_dist.engine.accelerators import PEAKS
from fine_dist.engine.settings import EngineConfig

UTILIZATION = 0.4
"""Assumed share of an accelerator's peak that training reaches (MFU)."""
ASSUMED_TFLOPS = 120.0
"""Assumed training rate of an accelerator of unknown kind, in TFLOP/s: about that of an A100 in bf16."""
CORE_GFLOPS = 40.0
"""Assumed rate of one CPU core, in GFLOP/s of fp32."""
UNKNOWN = "NVIDIA A100-SXM4-80GB"
"""Accelerator that is assumed if none is known."""
MEMORY_GIB = {
    "A10": 24, "A10G": 24, "A30": 24, "A40": 48, "A4000": 16, "A5000": 24, "A6000": 48, "B200": 180, "B300": 270,
    "GB200": 186, "GB300": 278, "GH200": 96, "H100": 80, "H100 NVL": 94, "H20": 96, "H200": 141, "H800": 80, "L4": 24,
    "L40": 48, "L40S": 48, "MI210": 64, "MI250": 64, "MI250X": 64, "MI300A": 128, "MI300X": 192, "MI325X": 256,
    "MI355X": 288, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "RTX 6000 Ada": 48, "T4": 16,
}  # fmt: skip
"""Memory of one device in GiB, if the driver's name does not state it; for MI250 and MI250X, of each half."""
_VENDOR = re.compile(r"NVIDIA (GeForce )?|AMD Instinct |Tesla ")


@dataclass(frozen=True)
class DeviceModel:
    """The device of one process, as estimates assume it."""

    name: str
    """Name for messages: `an H100`, `8 CPU cores`."""
    flops_per_s: float
    """Training rate of one process in FLOP/s."""
    accelerator: bool
    """Whether it is an accelerator, and not CPU cores."""
    memory_bytes: float | None = None
    """Memory of the accelerator in bytes. None: unknown, or there is none."""

    @property
    def rate(self) -> str:
        """The rate as text: `124.8 TFLOP/s (an A100 at 40% of its peak)`."""
        share = f" at {UTILIZATION:.0%} of its peak" if self.accelerator else ""
        return f"{self.flops_per_s / 1e12:.3g} TFLOP/s ({self.name}{share})"


def device_for(spec: str | None, launch: LaunchConfig, engine: EngineConfig | None = None) -> DeviceModel:
    """The device that one process of a job will use.

    Args:
        spec: Value of `--for`: `gpu:h100`, `cpu` or `cpu:16`. None derives the device from the settings: a job that
            requests accelerators gets this machine's, or an A100 if it has none; any other job uses this machine's
            accelerator if it has one, else the CPU.
        launch: The `launch` settings of the job.
        engine: The `engine` settings of a stage that trains.

    Raises:
        ConfigError: `--for` does not name a known device.
    """
    precision = engine.precision if engine else "bf16"
    kind, _, name = (spec or "").partition(":")
    if spec is not None and kind not in ("gpu", "cpu"):
        raise ConfigError(f"--for {spec!r}: no such kind of device; legal: gpu:NAME, such as gpu:h100, cpu, cpu:CORES")
    if kind == "gpu":
        return _accelerator(_driver_name(name), precision)
    if kind == "cpu":
        if name and not (name.isascii() and name.isdecimal() and int(name) > 0):
            raise ConfigError(f"--for {spec!r}: a number of cores is needed after cpu: (got {name!r})")
        return _cores(int(name) if name else num_cores())
    if not launch.gpus and engine is not None and engine.device == "cpu":
        return _cores(engine.threads or num_cores())
    local = _local_accelerator()
    if local is not None:
        return _accelerator(local, precision)
    if launch.gpus or (engine is not None and engine.device == "cuda"):
        return _accelerator(UNKNOWN, precision)
    return _cores((engine.threads if engine else None) or max(launch.cpus, num_cores()))


def _cores(count: int) -> DeviceModel:
    name = f"{count} CPU cores at {CORE_GFLOPS:g} GFLOP/s" if count > 1 else f"a CPU core at {CORE_GFLOPS:g} GFLOP/s"
    return DeviceModel(name, count * CORE_GFLOPS * 1e9, accelerator=False)


def _accelerator(name: str, precision: str) -> DeviceModel:
    """The model of a device, by its driver's name; for a device in no table, that of `UNKNOWN`."""
    peak = PEAKS.get(name, PEAKS[UNKNOWN])
    tflops = getattr(peak, precision) or peak.fp32
    short = _VENDOR.sub("", name)
    size = re.search(r"(\d+)GB", short)
    # The longest match, because A10 is a prefix of A100, and L4 of L40S.
    known = max((key for key in MEMORY_GIB if short.removeprefix("RTX ").startswith(key) or short.startswith(key)),
                key=len, default="")  # fmt: skip
    # The number in the name of a Grace Hopper is its host memory.
    memory = int(size[1]) if size and not short.startswith("GH") else MEMORY_GIB.get(known, 0)
    article = "an" if short[0] in "AHLMR" else "a"
    return DeviceModel(f"{article} {short}", UTILIZATION * tflops * 1e12, True, memory * GIB or None)


def _driver_name(name: str) -> str:
    """The driver's name of the first device in the table that starts with the user's name for it, ignoring case."""
    prefix = _alphanumeric(name)
    for known in PEAKS:
        short = _alphanumeric(_VENDOR.sub("", known))
        if prefix and (short.startswith(prefix) or short.removeprefix("rtx").startswith(prefix)):
            return known
    legal = [_VENDOR.sub("", known) for known in PEAKS]
    raise ConfigError(f"--for gpu:{name}: no such accelerator is known; {nearest(name.upper(), legal)}")


def _alphanumeric(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _local_accelerator() -> str | None:
    """The driver's name of this machine's accelerator, or None."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
