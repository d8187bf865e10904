"""What this process may use of the machine: cores and memory, as its container (cgroup) limits them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30
FAR_BEYOND = 2.0
"""A job whose estimated memory exceeds this multiple of the available memory is refused before it starts, because the
kernel would kill it without a message. Estimates may be off by some tens of percent, so the multiple is above 1."""
CGROUPS = Path("/sys/fs/cgroup")
"""Where the kernel's control groups are mounted."""


def num_cores() -> int:
    """CPU cores that this process may use: its affinity, and the quota of its container where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in _quotas() if quota > 0]
    # Quotas are rounded down, because threads beyond the quota only wait for each other.
    return max(1, min([cores, *(int(quota) for quota in quotas)]))


def memory_bytes() -> int:
    """Host memory in bytes that this process may use: the machine's, or its container's limit where that is less."""
    # The smallest limit counts: a container inside a container has both.
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name, controller in (("memory.max", ""), ("memory.limit_in_bytes", "memory")):
        limits += [int(text) for text in _read_all(name, controller) if text.isdecimal()]  # "max": no limit
    return min(limits)


def _quotas() -> Iterator[float]:
    """Cores that control groups grant: `cpu.max` of version 2, a quota and its period of version 1."""
    for text in _read_all("cpu.max", ""):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)
    quotas, periods = (_read_all(f"cpu.cfs_{name}_us", "cpu") for name in ("quota", "period"))
    for quota, period in zip(quotas, periods):
        if quota.isdecimal() and period.isdecimal():  # -1: no quota
            yield int(quota) / int(period)


def _read_all(name: str, controller: str) -> list[str]:
    """The contents of a control file in this process's group and in all groups above it, each of which limits it.

    Args:
        name: Name of the file, such as `memory.max`.
        controller: Controller of version 1, such as `memory`; empty for version 2, where all are in one tree.
    """
    texts = []
    for folder in _groups(controller):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            texts.append((folder / name).read_text(encoding="ascii").strip())
    return texts


def _groups(controller: str) -> list[Path]:
    """Folders of this process's control group and of those above it, as far as this process sees them."""
    group = "/"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = path
    # Version 1 mounts one folder per controller, and version 2 beside them as `unified`.
    roots = [CGROUPS / controller] if controller else [CGROUPS, CGROUPS / "unified"]
    # `..` appears in the path of a group outside of this process's namespace, which is not mounted here.
    parts = [part for part in group.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:end]) for root in roots for end in range(len(parts) + 1)]
