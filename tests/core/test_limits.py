"""What a process may use: the machine's cores and memory, or less where its container (cgroup) says so."""

from __future__ import annotations

import os

import pytest

from fine_dist.core import limits
from fine_dist.core.limits import GIB, memory_bytes, num_cores


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A tree in place of /sys/fs/cgroup, with this process at `/`, which is how a container sees it."""
    monkeypatch.setattr(limits, "CGROUPS", tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")

    return write


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_containers_memory_limit_counts_and_one_above_the_machine_does_not(cgroups, name):
    machine = memory_bytes()
    cgroups(name, str(GIB))
    assert memory_bytes() == GIB < machine
    cgroups(name, str(2**63 - 4096))  # what version 1 says where there is no limit
    assert memory_bytes() == machine
    cgroups(name, "max")
    assert memory_bytes() == machine


def test_a_quota_of_cores_counts(cgroups):
    cores = num_cores()
    assert cores == len(os.sched_getaffinity(0))
    for text, expected in (("100000 100000", 1), ("50000 100000", 1), ("max 100000", cores), ("9900000 100000", cores)):
        cgroups("cpu.max", text)
        assert num_cores() == expected, text
    cgroups("cpu.max", "max 100000")
    cgroups("cpu/cpu.cfs_quota_us", "100000")
    cgroups("cpu/cpu.cfs_period_us", "100000")
    assert num_cores() == 1
    cgroups("cpu/cpu.cfs_quota_us", "-1")
    assert num_cores() == cores


def test_every_group_above_a_process_limits_it(cgroups, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_groups", lambda controller: [tmp_path, tmp_path / "a"] if not controller else [])
    cgroups("memory.max", str(3 * GIB))
    cgroups("a/memory.max", str(GIB))
    assert memory_bytes() == GIB
    cgroups("a/memory.max", str(5 * GIB))
    assert memory_bytes() == 3 * GIB
