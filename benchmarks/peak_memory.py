"""Peak memory of a call, from a GPU's allocator or from this process's resident set (Linux)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_memory_of(step: Callable[[], float], device: torch.device) -> float:
    """Bytes by which memory grows at most during the second call of `step`; the first creates the optimizer's state."""
    import torch

    step()
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    return resident_growth(step)


def resident_growth(body: Callable[[], object]) -> float:
    """Bytes by which this process's resident set grows at most during a call (Linux; 0 on other systems)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        body()
        return 0.0
    # Freed memory that the allocator retains is resident, and its reuse during the call would not be measured.
    release_free_memory()
    reset.write_text("5")  # resets VmHWM, the peak, to the current size (proc(5))
    before = kib(status, "VmRSS")
    body()
    return (kib(status, "VmHWM") - before) * 1024.0


def release_free_memory() -> None:
    """Return freed memory to the system (glibc's `malloc_trim`)."""
    import ctypes

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def kib(status: Path, key: str) -> int:
    """The value of a key in KiB, from a file such as /proc/self/status."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1])
