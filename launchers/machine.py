"""The accelerators of this machine, as torch sees them, and the number of jobs that the machine holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

from fine_dist.core.errors import LaunchError
from fine_dist.core.limits import GIB, memory_bytes, num_cores
from fine_dist.launchers.spec import Capacity, Finding, JobSpec

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Environment variables by which CUDA and ROCm restrict a process to some accelerators of the machine."""
_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())] if cuda else []
other = [n for n, m in (("XPU", getattr(torch, "xpu", None)), ("MPS", torch.backends.mps)) if m and m.is_available()]
built = "CUDA " + torch.version.cuda if torch.version.cuda else "ROCm " + torch.version.hip if torch.version.hip else ""
print(json.dumps({"bytes": sizes, "other": other, "torch": torch.__version__, "built": built}))
"""


@dataclass(frozen=True)
class Accelerators:
    """The accelerators that a new process on this machine could use."""

    bytes_each: tuple[int, ...]
    """Memory of each accelerator in bytes."""
    note: str
    """Why there is none, or none that this project supports; empty if there are some."""


def accelerators() -> Accelerators:
    """The accelerators that torch can use in a process with this environment (CUDA and ROCm).

    They are counted by torch, because nvidia-smi and the environment may be wrong: CUDA_VISIBLE_DEVICES may name
    devices that do not exist (SLURM's NoDevFiles, an image's `0`), and a driver may be too old for this torch.
    """
    # The variables are the key of the cache, because a test or a notebook may change them between two calls.
    return _probe(tuple(os.environ.get(name) for name in VISIBLE))


@cache
def _probe(visible: tuple[str | None, ...]) -> Accelerators:
    """Count the accelerators in a new process, because CUDA cannot be used in forks of a process that has used it."""
    result = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        return Accelerators((), f"torch could not be asked: {last[0]}")
    report = json.loads(result.stdout.splitlines()[-1])  # earlier lines may be of packages that torch imports
    if report["bytes"]:
        return Accelerators(tuple(report["bytes"]), "")
    built = report["built"] or "the CPU only"
    if report["other"]:
        return Accelerators((), f"it has {report['other'][0]}, which is not supported: CUDA and ROCm are")
    return Accelerators((), f"torch {report['torch']} is built for {built}")


def visible_devices() -> list[str]:
    """The usable accelerators, as values for CUDA_VISIBLE_DEVICES."""
    count = len(accelerators().bytes_each)
    # A variable that is set holds UUIDs or a subset such as `2,3`; jobs get its entries, not indices from 0.
    entries = next((os.environ[name].split(",") for name in VISIBLE if os.environ.get(name)), None)
    return [entry.strip() for entry in entries[:count]] if entries else [str(i) for i in range(count)]


def fits_here(spec: JobSpec, devices: int) -> int:
    """Number of jobs like this one that this machine runs at the same time, at least 1.

    Args:
        spec: One of the jobs.
        devices: Number of accelerators that they may use. 0: accelerators do not limit the number.
    """
    jobs = num_cores() // (spec.processes_per_node * spec.cpus_per_process)
    if spec.accelerators_per_node and devices:
        # The small term makes a quotient such as 6.9999999, which is 7 except for rounding errors, count as 7.
        jobs = min(jobs, int(devices / spec.accelerators_per_node + 1e-9))
    return max(1, jobs)


def local_capacity(spec: JobSpec, many: bool = True, gpu_memory_gb: float | None = None) -> Capacity:
    """The resources of this machine for jobs like this one.

    Args:
        spec: One of the jobs.
        many: Whether there are several; a single job may use the entire machine.
        gpu_memory_gb: Memory of an accelerator in GiB. None: the measured memory.
    """
    sizes = accelerators().bytes_each if spec.accelerators_per_node else ()
    workers = fits_here(spec, len(sizes)) if many else 1
    memory = spec.memory_gb * GIB if spec.memory_gb else memory_bytes() / workers
    if not sizes:
        return Capacity(workers, None, True, memory)
    return Capacity(workers, gpu_memory_gb * GIB if gpu_memory_gb else min(sizes), False, memory)


def missing_accelerators(spec: JobSpec) -> Finding | None:
    """A finding if this machine has fewer accelerators than a job requests, else None."""
    wanted = spec.accelerators_per_node
    # Tested first, because counting the accelerators takes seconds.
    if not wanted or len(accelerators().bytes_each) >= wanted:
        return None
    here = accelerators()
    count = len(here.bytes_each)
    each = wanted / spec.processes_per_node
    has = f"has {count}" if count else f"shows no accelerator; {here.note}"
    fewer = "lower launch.gpus or launch.processes; " if count else "check nvidia-smi and CUDA_VISIBLE_DEVICES; "
    text = f"launch.gpus {each:g} for {spec.processes_per_node} processes, and this machine {has}"
    remedy = "--launch.gpus 0 computes on the CPU; --launcher slurm or ray sends it to machines that have them"
    return Finding("gpus", "note", f"{text}; {fewer}{remedy}")


def require_accelerators(spec: JobSpec) -> None:
    """Refuse to start a job on this machine if it requests more accelerators than there are.

    Raises:
        LaunchError: The message says what this machine has, and the remedy.
    """
    missing = missing_accelerators(spec)
    if missing:
        raise LaunchError(missing.text)
