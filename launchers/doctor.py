"""What a machine or a cluster does for jobs: probes that run inside a short job, and what their reports mean.

`probe` runs in every process of the job and writes one report; `diagnose` turns the reports into findings and into
lines for `slurm/site.sh`. Each probe does the very thing that jobs rely on (takes a lock, makes a link, opens a
connection), because what a site's documentation says of it may not hold for its nodes.
"""

from __future__ import annotations

import contextlib
import getpass
import grp
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from fine_dist.core.config import Config, validate
from fine_dist.core.files import write_atomic
from fine_dist.core.limits import GIB, memory_bytes, num_cores
from fine_dist.core.locks import is_locked, try_lock
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.machine import accelerators
from fine_dist.launchers.preflight import NETWORK, file_system
from fine_dist.launchers.slurm_queue import outside_allocation, scheduler_words
from fine_dist.launchers.spec import Finding
from fine_dist.launchers.worker import SCRATCH, rank, world_size

TOKEN = "FINE_DIST_DOCTOR"
"""Environment variable that the submitting process sets, to see whether jobs receive its environment."""
MEET_S = 60.0
"""Seconds that the processes of the job wait for each other."""
LOCAL_FOLDERS = ("$SLURM_TMPDIR", "$TMPDIR", "$LOCAL_SCRATCH", "/scratch/$USER", "/local/$USER", "/tmp")
"""Folders that are often on a node's own disk, the most specific first."""
FAST_INTERFACES = ("ib", "hsn", "opa", "mlx")
"""Prefixes of network interfaces that are faster than Ethernet."""
SMALL_SHM = GIB
"""Size of /dev/shm in bytes below which data workers and NCCL may fail."""


class Report(Config):
    """What one process of the job found."""

    rank: int
    """Rank of the process."""
    host: str
    """Name of its host."""
    token: str | None = None
    """The submitting process's token as it arrived here; None: the environment was not exported."""
    cores: int = 0
    """CPU cores that the process may use."""
    memory_bytes: int = 0
    """Host memory that the process may use, in bytes."""
    devices: int = 0
    """Accelerators that torch can use."""
    device_note: str = ""
    """Why there are none."""
    seen: bool = False
    """Whether the process saw the files of all others in run_dir."""
    lock: str = ""
    """What happened to a second lock on a locked file: `held`, `taken` or an error."""
    link: str = ""
    """What happened when a hard link was made: `ok` or an error."""
    mode: str = ""
    """Mode of a new file in run_dir, and the umask: `0644 (umask 022)`."""
    group: str = ""
    """What became of the group of a folder with the setgid bit: `kept`, `lost` or an error."""
    shm_bytes: int = 0
    """Size of /dev/shm in bytes."""
    compiler: bool = False
    """Whether a C++ compiler is there, which torch.compile and DeepSpeed use."""
    temporary: str = ""
    """Folder of temporary files, and the type of its file system."""
    scratch: str = ""
    """A folder on the node's own disk that can be written to: its name, unexpanded. Empty: none was found."""
    cluster_scratch: str = ""
    """Type of the file system of the cluster's $SCRATCH. Empty: the variable is not set."""
    interfaces: dict[str, str] = Field(default_factory=dict)
    """IPv4 address of every network interface, loopback left out."""
    reached: str = ""
    """Whether rank 0 could be connected to by its host name: `ok` or an error."""
    requeue: str = ""
    """What `scontrol requeue` did: `ok`, or the scheduler's words. Empty: not tried."""


# --- inside the job --------------------------------------------------------------------------------------------------


def probe(run_dir: Path) -> Path:
    """Run all probes in this process of the job and write its report.

    Args:
        run_dir: Folder that all processes share.

    Returns:
        The report's file.
    """
    me, size = rank(), world_size()
    folder = run_dir / "doctor"
    folder.mkdir(parents=True, exist_ok=True)
    # First of all, because the job starts from the beginning when it succeeds.
    requeue = _try_requeue(folder, me)
    (folder / f"seen-{me}").touch()
    seen = _wait_for([folder / f"seen-{other}" for other in range(size)])
    here = accelerators()
    report = Report(
        rank=me,
        host=socket.gethostname(),
        token=os.environ.get(TOKEN),
        cores=num_cores(),
        memory_bytes=memory_bytes(),
        devices=len(here.bytes_each),
        device_note=here.note,
        seen=seen,
        lock=_lock(folder, me),
        link=_link(folder, me),
        mode=_mode(folder, me),
        group=_group(folder, me),
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        compiler=any(shutil.which(name) for name in ("c++", "g++", "clang++")),
        temporary=f"{tempfile.gettempdir()} ({file_system(Path(tempfile.gettempdir()))})",
        scratch=next((name for name in LOCAL_FOLDERS if _is_local(name)), ""),
        cluster_scratch=file_system(Path(os.environ["SCRATCH"])) if os.environ.get("SCRATCH") else "",
        interfaces=_interfaces(),
        reached=_reach(folder, me, size),
        requeue=requeue,
    )
    return write_atomic(folder / f"report-{me}.json", report.model_dump_json(indent=1) + "\n")


def _wait_for(paths: list[Path], seconds: float = MEET_S) -> bool:
    """Whether all files are there within some seconds. Listing the folder refreshes what an NFS client has cached."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            os.listdir(paths[0].parent)
        if all(path.exists() for path in paths):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _try_requeue(folder: Path, me: int) -> str:
    """On SLURM, put the job back into the queue once: the only proof that users may do that."""
    job = os.environ.get("SLURM_JOB_ID")
    mark = folder / "requeue"
    if not job or "SLURM_STEP_ID" not in os.environ:
        return ""
    # This is the second start: the requeue below worked.
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return "ok"
    if me == 0:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if done.returncode:
            write_atomic(mark, scheduler_words(done.stderr or done.stdout))
    # Accepted: the job ends now and starts again. Refused: rank 0 leaves a note for all.
    return mark.read_text(encoding="utf-8") if _wait_for([mark]) else "accepted, and the job was not restarted"


def _lock(folder: Path, me: int) -> str:
    """Rank 0 holds a lock, and every process, rank 0 included, tries to take it."""
    path, ready = folder / "lock", folder / "lock-ready"
    try:
        if me == 0:
            path.touch()
            with open(path, "rb+") as file:
                if not try_lock(file.fileno(), path):
                    return "error: a new file is locked"
                ready.touch()
                answer = is_locked(path)
                if others := [folder / f"lock-{other}" for other in range(1, world_size())]:
                    _wait_for(others)
        else:
            if not _wait_for([ready]):
                return "error: rank 0 did not lock"
            answer = is_locked(path)
            (folder / f"lock-{me}").touch()
    except Exception as error:  # whatever a file system answers is the finding
        return f"error: {error}"
    return {True: "held", False: "taken", None: "error: no locks here"}[answer]


def _link(folder: Path, me: int) -> str:
    source, target = folder / f"link-{me}", folder / f"linked-{me}"
    source.touch()
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        return str(error.strerror)
    return "ok"


def _mode(folder: Path, me: int) -> str:
    path = folder / f"mode-{me}"
    path.unlink(missing_ok=True)
    path.touch()
    umask = os.umask(0)
    os.umask(umask)
    return f"{stat.S_IMODE(path.stat().st_mode):04o} (umask {umask:03o})"


def _group(folder: Path, me: int) -> str:
    """Whether files in a folder with the setgid bit belong to the folder's group, as members of a project expect."""
    shared = folder / f"group-{me}"
    shared.mkdir(exist_ok=True)
    # A group other than the default one, since only then does the result tell setgid from the default.
    others = [group for group in os.getgroups() if group != os.getegid()] or [os.getegid()]
    try:
        os.chown(shared, -1, others[0])
        shared.chmod(0o2770)
        path = write_atomic(shared / "file", "x")
    except OSError as error:
        return f"not tried: {error.strerror}"
    return "kept" if path.stat().st_gid == others[0] else f"lost: {grp.getgrgid(path.stat().st_gid).gr_name}"


def _is_local(name: str) -> bool:
    """Whether a folder (or its parent, while it does not exist) is on the node's own disk and can be written to."""
    expanded = os.path.expandvars(name.replace("$USER", getpass.getuser()))
    if "$" in expanded:
        return False
    path = Path(expanded)
    path = path if path.is_dir() else path.parent
    return path != Path("/") and os.access(path, os.W_OK) and file_system(path) not in {*NETWORK, "tmpfs", "ramfs"}


def _interfaces() -> dict[str, str]:
    if not shutil.which("ip"):
        return {}
    listing = subprocess.run(["ip", "-4", "-o", "addr", "show", "up"], capture_output=True, text=True, check=False)
    lines = [line.split() for line in listing.stdout.splitlines()]
    return {words[1]: words[3].partition("/")[0] for words in lines if len(words) > 3 and words[1] != "lo"}


def _reach(folder: Path, me: int, size: int) -> str:
    """Every process connects to rank 0 by its host name, as torchrun's ranks do."""
    address = folder / "address"
    if me == 0:
        # All interfaces and any port, as for torchrun: the question
        # is whether the host *name* leads to a reachable one.
        with socket.create_server(("", 0), backlog=size) as server:
            server.settimeout(MEET_S)
            write_atomic(address, json.dumps([socket.gethostname(), server.getsockname()[1]]))
            try:
                for _ in range(size - 1):
                    server.accept()[0].close()
            except OSError as error:
                return f"a rank did not connect ({error})"
        return "ok"
    if not _wait_for([address]):
        return "rank 0 gave no address"
    host, port = json.loads(address.read_text(encoding="utf-8"))
    try:
        socket.create_connection((host, port), timeout=20).close()
    except OSError as error:
        return f"{host}:{port}: {error.strerror or error}"
    return "ok"


# --- what it means ---------------------------------------------------------------------------------------------------


def read_reports(run_dir: Path) -> list[Report]:
    """The reports of all processes, by rank."""
    paths = (run_dir / "doctor").glob("report-*.json")
    reports = [validate(Report, json.loads(path.read_text(encoding="utf-8")), str(path)) for path in paths]
    return sorted(reports, key=lambda report: report.rank)


def diagnose(reports: list[Report], needs: LaunchConfig, token: str, slurm: bool) -> tuple[list[Finding], list[str]]:
    """What the reports mean.

    Args:
        reports: Of all processes that reported.
        needs: What the job asked for.
        token: The value of `TOKEN` in the submitting process.
        slurm: Whether the job ran on SLURM.

    Returns:
        The findings, and the lines to put into `slurm/site.sh`.
    """
    wanted = needs.nodes * needs.processes
    hosts = ", ".join(sorted({report.host for report in reports}))
    level: Literal["ok", "stop"] = "ok" if len(reports) == wanted else "stop"
    found = [Finding("processes", level, f"{len(reports)} of {wanted} processes reported, on {hosts}")]
    found += [_verdict(check, reports) for check in _checks(reports, needs, token)]
    site: list[str] = []
    if slurm:
        found += _slurm_findings(reports, site)
    if any(report.cluster_scratch in NETWORK for report in reports):
        text = "the cluster's $SCRATCH is a shared file system; only SCRATCH in site.sh moves temporary files"
        found.append(Finding("scratch", "note", text))
    return found, site


class _Check(NamedTuple):
    """One question to every report."""

    what: str
    """Subject of the finding."""
    good: str
    """Text when no process has the fault."""
    works: Callable[[Report], bool]
    """Whether all is well for a process."""
    fault: Callable[[Report], str]
    """Text about a process for which it is not."""
    level: Literal["note", "stop"] = "stop"
    """Level of the fault."""


def _checks(reports: list[Report], needs: LaunchConfig, token: str) -> list[_Check]:
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
    """One finding about all processes: all is well, or the fault with the hosts that have it."""
    faults = {report.host: check.fault(report) for report in reports if not check.works(report)}
    if not faults:
        return Finding(check.what, "ok", check.good)
    return Finding(check.what, check.level, f"{', '.join(sorted(faults))}: {next(iter(faults.values()))}")


def _slurm_findings(reports: list[Report], site: list[str]) -> list[Finding]:
    """Findings about SLURM; appends the lines that site.sh needs."""
    found = []
    flag = _gpu_flag()
    if flag is None:
        found.append(Finding("gpu flag", "note", "sbatch takes no request for accelerators in the default partition"))
    elif flag != "gpus-per-node":
        site.append(f"GPU_FLAG={flag}")
    requeue = next((report.requeue for report in reports if report.rank == 0), "")
    if requeue == "ok":
        found.append(Finding("requeue", "ok", "users may requeue their jobs"))
    elif requeue:
        site.append("REQUEUE=resubmit")
        found.append(Finding("requeue", "note", f"users may not requeue ({requeue}): jobs submit themselves again"))
    interface = _fast_interface(reports)
    if interface:
        site.append(f"IFNAME={interface}")
    scratch = {report.scratch for report in reports}
    if not os.environ.get(SCRATCH) and len(scratch) == 1 and (name := scratch.pop()):
        site.append(f"SCRATCH={name}/fine_dist-${{SLURM_JOB_ID:-login}}")
    return found


def _devices(reports: list[Report], needs: LaunchConfig) -> str:
    counts = sorted({report.devices for report in reports})
    if not needs.gpus:
        return f"no accelerator was asked for (--launch.gpus 1); processes see {' or '.join(map(str, counts))}"
    return f"every process can use {' or '.join(map(str, counts))} accelerators"


def _fast_interface(reports: list[Report]) -> str | None:
    """An interface faster than Ethernet that every node has, where there are several interfaces to choose from."""
    common = set.intersection(*(set(report.interfaces) for report in reports)) if reports else set()
    fast = sorted(name for name in common if name.startswith(FAST_INTERFACES))
    return fast[0] if fast and len(common) > 1 else None


def _gpu_flag() -> str | None:
    """The first option for accelerators that sbatch accepts; None: it accepts none."""
    for flag, option in (("gpus-per-node", "--gpus-per-node=1"), ("gres", "--gres=gpu:1"),
                         ("gpus-per-task", "--gpus-per-task=1")):  # fmt: skip
        with outside_allocation():
            command = ["sbatch", "--test-only", option, "--ntasks=1", "--wrap=true"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return flag
    return None
