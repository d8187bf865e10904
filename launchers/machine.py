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
"""Environment variables that choose among the accelerators of a machine."""
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
    """The accelerators that a process started here could use."""

    bytes_each: tuple[int, ...]
    """Memory of each in bytes."""
    note: str
    """Why there are none, or none that this project uses; empty when there are some."""


def accelerators() -> Accelerators:
    """The accelerators that torch can use in a process with this environment (CUDA and ROCm).

    torch is asked, not nvidia-smi and not the environment: CUDA_VISIBLE_DEVICES may name devices that do not exist
    (SLURM's NoDevFiles, an image's `0`), and a driver may be too old for this torch.
    """
    # The variables are the key of the cache: in one process they may change between two questions (tests, notebooks).
    return _probe(tuple(os.environ.get(name) for name in VISIBLE))


@cache
def _probe(visible: tuple[str | None, ...]) -> Accelerators:
    # In a process of its own: once a process has initialized CUDA, its forks cannot use it.
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return Accelerators((), f"torch could not be asked: {last[0]}")
    said = json.loads(done.stdout.splitlines()[-1])
    if said["bytes"]:
        return Accelerators(tuple(said["bytes"]), "")
    built = said["built"] or "the CPU only"
    if said["other"]:
        return Accelerators((), f"it has {said['other'][0]}, which is not supported: CUDA and ROCm are")
    return Accelerators((), f"torch {said['torch']} is built for {built}")


def visible_devices() -> list[str]:
    """Names of the usable accelerators for CUDA_VISIBLE_DEVICES."""
    count = len(accelerators().bytes_each)
    # Names and not indices are passed on, because a variable may hold UUIDs or a subset such as `2,3`.
    named = next((os.environ[name].split(",") for name in VISIBLE if os.environ.get(name)), None)
    return [name.strip() for name in named[:count]] if named else [str(i) for i in range(count)]


def fits_here(spec: JobSpec, devices: int) -> int:
    """Number of such jobs that run at once on this machine, of which `devices` accelerators may be used; at least 1."""
    jobs = num_cores() // (spec.processes_per_node * spec.cpus_per_process)
    if spec.accelerators_per_node and devices:
        # The tiny term rounds a quotient such as 6.9999999 to the 7 that it is without rounding errors.
        jobs = min(jobs, int(devices / spec.accelerators_per_node + 1e-9))
    return max(1, jobs)


def local_capacity(spec: JobSpec, many: bool = True, gpu_memory_gb: float | None = None) -> Capacity:
    """What this machine holds of such jobs.

    Args:
        spec: One of the jobs.
        many: Whether there are several; a single job has the machine to itself.
        gpu_memory_gb: Memory of an accelerator in GiB, in place of the measured one.
    """
    sizes = accelerators().bytes_each if spec.accelerators_per_node else ()
    workers = fits_here(spec, len(sizes)) if many else 1
    memory = spec.memory_gb * GIB if spec.memory_gb else memory_bytes() / workers
    if not sizes:
        return Capacity(workers, None, True, memory)
    return Capacity(workers, gpu_memory_gb * GIB if gpu_memory_gb else min(sizes), False, memory)


def missing_accelerators(spec: JobSpec) -> Finding | None:
    """The accelerators that a job asks for and this machine lacks, or None. Only such a job has torch asked."""
    wanted = spec.accelerators_per_node
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
    """Refuse to start a job on this machine without the accelerators that it asks for.

    Raises:
        LaunchError: They are not here; the message says what is, and the remedy.
    """
    missing = missing_accelerators(spec)
    if missing:
        raise LaunchError(missing.text)
