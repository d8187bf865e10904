"""The accelerators of this machine, without touching one, and how many jobs fit on it."""

from __future__ import annotations

import os
import shutil
import subprocess

from fine_dist.core.limits import memory_bytes, num_cores
from launchers.spec import Capacity, JobSpec


def visible_devices() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, without importing torch or touching a GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def accelerator_bytes() -> float | None:
    """Memory of this machine's smallest accelerator; none without one."""
    if not shutil.which("nvidia-smi"):
        return None
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    sizes = [float(line) for line in said.splitlines() if line.strip().isdecimal()]
    return min(sizes) * 2**20 if sizes else None


def fits_here(spec: JobSpec, devices: int) -> int:
    """How many such jobs run at once on this machine, of which `devices` accelerators may be used."""
    by_cpu = num_cores() // (spec.processes_per_node * spec.cpus_per_process)
    if spec.accelerators_per_node and devices:
        by_cpu = min(by_cpu, int(devices / spec.accelerators_per_node + 1e-9))
    return max(1, by_cpu)


def local_capacity(spec: JobSpec, many: bool = True, gpu_memory_gb: float | None = None) -> Capacity:
    """This machine as the capacity of `many` such jobs, or of one alone. gpu_memory_gb: in place of what is found."""
    devices = len(visible_devices()) if spec.accelerators_per_node else 0
    workers = fits_here(spec, devices) if many else 1
    memory = spec.memory_gb * 2**30 if spec.memory_gb else memory_bytes() / workers
    if not devices:
        return Capacity(workers, None, True, memory)
    return Capacity(workers, gpu_memory_gb * 2**30 if gpu_memory_gb else accelerator_bytes(), False, memory)
