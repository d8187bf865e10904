"""`fine-dist doctor` on this machine, and what its findings mean; on a real SLURM: tests/cluster/test_slurm_site.py."""

from __future__ import annotations

import json

import pytest

from fine_dist.core.settings import LaunchConfig
from fine_dist.doctor import main
from fine_dist.launchers.diagnosis import diagnose
from fine_dist.launchers.probes import Report, _is_local, _lock

GOOD = {
    "token": "t", "cores": 4, "memory_bytes": 8 * 2**30, "devices": 1, "seen": True, "lock": "held", "link": "ok",
    "mode": "0644 (umask 022)", "group": "kept", "shm_bytes": 2**33, "compiler": True, "reached": "ok",
}  # fmt: skip


def findings(*changes: dict, needs: LaunchConfig | None = None) -> dict[str, tuple[str, str]]:
    reports = [Report(rank=i, host=f"n{i}", **{**GOOD, **change}) for i, change in enumerate(changes)]
    found, _ = diagnose(reports, needs or LaunchConfig(), "t", slurm=False)
    return {finding.what: (finding.level, finding.text) for finding in found}


def test_this_machine_is_looked_at_in_two_processes_that_meet(tmp_path, capsys, monkeypatch):
    for key in ("RAY_ADDRESS", "SLURM_JOB_ID", "RANK", "WORLD_SIZE", "FINE_DIST_JOB"):
        monkeypatch.delenv(key, raising=False)
    words = ["--launcher", "local", "--launch.processes", "2", "--run-dir", str(tmp_path), "--json"]
    assert main(words) == 0
    said = capsys.readouterr().out
    found = {f["what"]: f for f in json.loads(said[said.index("{") :])["findings"]}
    assert "2 of 2 processes reported" in found["processes"]["text"]
    for what in ("environment", "storage", "locks", "network", "cores", "gpus"):
        assert found[what]["level"] == "ok", found[what]


@pytest.mark.parametrize(
    ("change", "what", "level", "said"),
    [
        ({"token": None}, "environment", "stop", "n1: does not have the variables"),
        ({"seen": False}, "storage", "stop", "does not see what the other processes write"),
        ({"lock": "taken"}, "locks", "stop", "-o flock"),
        ({"link": "Operation not permitted"}, "links", "note", "no hard links (Operation not permitted)"),
        ({"group": "lost: users"}, "modes", "note", "lost: users"),
        ({"cores": 1}, "cores", "stop", "may use 1 cores of the 2"),
        ({"memory_bytes": 2**30}, "memory", "stop", "1.0 GiB of the 4"),
        ({"devices": 0, "device_note": "torch is built for the CPU only"}, "gpus", "stop", "built for the CPU only"),
        ({"shm_bytes": 2**26}, "shm", "note", "--shm-size"),
        ({"compiler": False}, "compiler", "note", "torch.compile"),
        ({"reached": "n0:1: timed out"}, "network", "stop", "n0:1: timed out; set IFNAME"),
    ],
)
def test_each_fault_of_one_node_is_named_with_the_node_and_the_remedy(change, what, level, said):
    found = findings({}, change, needs=LaunchConfig(processes=2, cpus=2, gpus=1, memory_gb=4))
    assert found[what][0] == level and said in found[what][1]
    assert all(other == "ok" for key, (other, _) in found.items() if key != what)


def test_a_process_that_did_not_report_is_a_fault():
    assert findings({}, needs=LaunchConfig(processes=2))["processes"] == ("stop", "1 of 2 processes reported, on n0")


def test_one_process_sees_its_own_lock_without_waiting_for_others(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert _lock(tmp_path, 0) == "held"


def test_a_user_without_a_name_has_no_scratch_of_that_name_and_no_error(tmp_path, monkeypatch):
    """In containers, the host's user ids often have no entry in /etc/passwd."""
    own = tmp_path / "nobody"
    own.mkdir()
    monkeypatch.setattr("fine_dist.launchers.probes.file_system", lambda path: "ext4")
    monkeypatch.setenv("USER", "nobody")
    monkeypatch.setenv("LOGNAME", "nobody")
    assert _is_local(f"{tmp_path}/$USER") and not _is_local(f"{tmp_path}/$UNKNOWN_VARIABLE")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert not _is_local(f"{tmp_path}/$USER") and _is_local(str(own))
