"""From the reports of `probes.py` to findings about a machine or cluster and to lines for `slurm/site.sh`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from fine_dist.core.config import validate
from fine_dist.core.limits import GIB
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.preflight import NETWORK
from fine_dist.launchers.probes import Report
from fine_dist.launchers.slurm_queue import outside_allocation
from fine_dist.launchers.spec import Finding
from fine_dist.launchers.worker import SCRATCH

FAST_INTERFACES = ("ib", "hsn", "opa", "mlx")
"""Prefixes of network interfaces that are faster than Ethernet."""
SMALL_SHM = GIB
"""Size of /dev/shm in bytes below which data workers and NCCL may fail."""


def read_reports(run_dir: Path) -> list[Report]:
    """The reports of all processes that have written one, sorted by rank.

    Raises:
        ConfigError: A report is of another version.
    """
    paths = (run_dir / "doctor").glob("report-*.json")
    reports = [validate(Report, json.loads(path.read_text(encoding="utf-8")), str(path)) for path in paths]
    return sorted(reports, key=lambda report: report.rank)


def diagnose(reports: list[Report], needs: LaunchConfig, token: str, slurm: bool) -> tuple[list[Finding], list[str]]:
    """Evaluate the reports of a job.

    Args:
        reports: Reports of all processes that wrote one.
        needs: Resources that the job requested.
        token: Value of `TOKEN` in the submitting process.
        slurm: Whether the job ran on SLURM.

    Returns:
        The findings, and the lines to put into `slurm/site.sh`.
    """
    wanted = needs.nodes * needs.processes
    hosts = ", ".join(sorted({report.host for report in reports}))
    level: Literal["ok", "stop"] = "ok" if len(reports) == wanted else "stop"
    findings = [Finding("processes", level, f"{len(reports)} of {wanted} processes reported, on {hosts}")]
    findings += [_verdict(check, reports) for check in _checks(reports, needs, token)]
    site: list[str] = []
    if slurm:
        findings += _slurm_findings(reports, site)
    if any(report.cluster_scratch in NETWORK for report in reports):
        text = "the cluster's $SCRATCH is a shared file system; only SCRATCH in site.sh moves temporary files"
        findings.append(Finding("scratch", "note", text))
    return findings, site


class _Check(NamedTuple):
    """A condition that every report must fulfill."""

    what: str
    """Subject of the finding."""
    good: str
    """Text of the finding if all reports fulfill the condition."""
    works: Callable[[Report], bool]
    """Whether a report fulfills the condition."""
    fault: Callable[[Report], str]
    """Text about a report that does not fulfill it."""
    level: Literal["note", "stop"] = "stop"
    """Level of the fault."""


def _checks(reports: list[Report], needs: LaunchConfig, token: str) -> list[_Check]:
    """All conditions, for a job that requested `needs`."""
    mode = reports[0].mode if reports else "?"
    least = min((report.memory_bytes for report in reports), default=0) / GIB
    return [
        _Check(
            "environment", "jobs have the variables of the submitting shell", lambda r: r.token == token,
            lambda r: "does not have the variables that were set where the job was submitted",
        ),
        _Check(
            "storage", "every process sees what the others write", lambda r: r.seen,
            lambda r: "does not see what the other processes write into run_dir; use storage that all nodes mount",
        ),
        _Check(
            "locks", "every process sees the locks of the others", lambda r: r.lock == "held",
            lambda r: f"does not see a lock ({r.lock}); mount it with locks (Lustre: -o flock, NFS: version 4)",
        ),
        _Check(
            "links", "hard links work", lambda r: r.link == "ok",
            lambda r: f"has no hard links ({r.link}); new files are made by renames instead", "note",
        ),
        _Check(
            "modes", f"new files have mode {mode} and the group of their folder", lambda r: r.group == "kept",
            lambda r: f"group of files in a folder with the setgid bit: {r.group}; mode {r.mode}", "note",
        ),
        _Check(
            "cores", f"every process may use the {needs.cpus} cores it asked for", lambda r: r.cores >= needs.cpus,
            lambda r: f"may use {r.cores} cores of the {needs.cpus} that were asked for",
        ),
        _Check(
            "memory", f"{least:.1f} GiB may be used on a node",
            lambda r: not needs.memory_gb or r.memory_bytes >= 0.95 * needs.memory_gb * GIB,
            lambda r: f"may use {r.memory_bytes / GIB:.1f} GiB of the {needs.memory_gb:g} that were asked for",
        ),
        _Check(
            "gpus", _devices(reports, needs), lambda r: r.devices >= needs.gpus,
            lambda r: f"torch can use {r.devices} accelerators of the {needs.gpus:g} of a process: {r.device_note}",
        ),
        _Check(
            "shm", "/dev/shm is large enough", lambda r: r.shm_bytes >= SMALL_SHM,
            lambda r: f"/dev/shm has {r.shm_bytes / GIB:.2f} GiB: data workers and NCCL may fail; give a container "
            "more (--shm-size, --bind /dev/shm)", "note",
        ),
        _Check(
            "compiler", "a C++ compiler is there", lambda r: r.compiler,
            lambda r: "has no C++ compiler, which torch.compile and DeepSpeed's kernels need", "note",
        ),
        _Check(
            "network", "every process connects to rank 0", lambda r: r.reached == "ok",
            lambda r: f"cannot connect to rank 0: {r.reached}; set IFNAME, or have the ports opened",
        ),
    ]  # fmt: skip


def _verdict(check: _Check, reports: list[Report]) -> Finding:
    """The finding of a check over all processes: `ok`, or the first fault and all hosts with a fault."""
    faults = {report.host: check.fault(report) for report in reports if not check.works(report)}
    if not faults:
        return Finding(check.what, "ok", check.good)
    return Finding(check.what, check.level, f"{', '.join(sorted(faults))}: {next(iter(faults.values()))}")


def _slurm_findings(reports: list[Report], site: list[str]) -> list[Finding]:
    """Findings about SLURM; appends the lines that site.sh needs."""
    findings = []
    flag = _gpu_flag()
    if flag is None:
        text = "sbatch takes no request for accelerators in the default partition"
        findings.append(Finding("gpu flag", "note", text))
    elif flag != "gpus-per-node":
        site.append(f"GPU_FLAG={flag}")
    requeue = next((report.requeue for report in reports if report.rank == 0), "")
    if requeue == "ok":
        findings.append(Finding("requeue", "ok", "users may requeue their jobs"))
    elif requeue:
        site.append("REQUEUE=resubmit")
        findings.append(Finding("requeue", "note", f"users may not requeue ({requeue}): jobs submit themselves again"))
    interface = _fast_interface(reports)
    if interface:
        site.append(f"IFNAME={interface}")
    scratch = {report.scratch for report in reports}
    if not os.environ.get(SCRATCH) and len(scratch) == 1 and (name := scratch.pop()):
        site.append(f"SCRATCH={name}/fine_dist-${{SLURM_JOB_ID:-login}}")
    return findings


def _devices(reports: list[Report], needs: LaunchConfig) -> str:
    """Text about the numbers of accelerators that the processes can use."""
    counts = sorted({report.devices for report in reports})
    if not needs.gpus:
        return f"no accelerator was asked for (--launch.gpus 1); processes see {' or '.join(map(str, counts))}"
    return f"every process can use {' or '.join(map(str, counts))} accelerators"


def _fast_interface(reports: list[Report]) -> str | None:
    """An interface faster than Ethernet that every node has; None if there is none, or no other interface."""
    common = set.intersection(*(set(report.interfaces) for report in reports)) if reports else set()
    fast = sorted(name for name in common if name.startswith(FAST_INTERFACES))
    return fast[0] if fast and len(common) > 1 else None


def _gpu_flag() -> str | None:
    """The first option for accelerators that `sbatch --test-only` accepts; None: it accepts none."""
    for flag, option in (("gpus-per-node", "--gpus-per-node=1"), ("gres", "--gres=gpu:1"),
                         ("gpus-per-task", "--gpus-per-task=1")):  # fmt: skip
        with outside_allocation():
            command = ["sbatch", "--test-only", option, "--ntasks=1", "--wrap=true"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return flag
    return None
