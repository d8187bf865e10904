"""Probes of a machine or cluster that run inside a short job: each process tests what jobs rely on and writes a report.

Each probe performs the operation that jobs rely on (takes a lock, makes a link, opens a connection), because a site's
documentation may not describe its nodes correctly. `diagnosis.py` turns the reports into findings.
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
from pathlib import Path

from pydantic import Field

from fine_dist.core.config import Config
from fine_dist.core.files import write_atomic
from fine_dist.core.limits import memory_bytes, num_cores
from fine_dist.core.locks import is_locked, try_lock
from fine_dist.launchers.machine import accelerators
from fine_dist.launchers.preflight import NETWORK, file_system
from fine_dist.launchers.slurm_queue import scheduler_message
from fine_dist.launchers.worker import rank, world_size

TOKEN = "FINE_DIST_DOCTOR"
"""Environment variable that the submitting process sets, to see whether jobs receive its environment."""
MEET_S = 60.0
"""Seconds that the processes of the job wait for each other."""
LOCAL_FOLDERS = ("$SLURM_TMPDIR", "$TMPDIR", "$LOCAL_SCRATCH", "/scratch/$USER", "/local/$USER", "/tmp")
"""Folders that are often on a node's own disk, the most specific first."""


class Report(Config):
    """What one process of the job found."""

    rank: int
    """Rank of the process."""
    host: str
    """Name of its host."""
    token: str | None = None
    """Value of `TOKEN` in this process. None: the environment of the submitting process was not exported."""
    cores: int = 0
    """CPU cores that the process may use."""
    memory_bytes: int = 0
    """Host memory that the process may use, in bytes."""
    devices: int = 0
    """Number of accelerators that torch can use."""
    device_note: str = ""
    """Why there are none; empty if there are some."""
    seen: bool = False
    """Whether the process saw the files of all others in run_dir."""
    lock: str = ""
    """What happened to a second lock on a locked file: `held`, `taken` or an error."""
    link: str = ""
    """What happened when a hard link was made: `ok` or an error."""
    mode: str = ""
    """Mode of a new file in run_dir, and the umask: `0644 (umask 022)`."""
    group: str = ""
    """Whether a new file in a folder with the setgid bit got the folder's group: `kept`, `lost` or an error."""
    shm_bytes: int = 0
    """Size of /dev/shm in bytes."""
    compiler: bool = False
    """Whether there is a C++ compiler, which torch.compile and DeepSpeed use."""
    temporary: str = ""
    """Folder of temporary files, and the type of its file system."""
    scratch: str = ""
    """A writable folder on the node's local disk, with variables not expanded. Empty: none was found."""
    cluster_scratch: str = ""
    """Type of the file system of the cluster's $SCRATCH. Empty: the variable is not set."""
    interfaces: dict[str, str] = Field(default_factory=dict)
    """IPv4 address of every network interface except loopback, by name."""
    reached: str = ""
    """Whether the process could connect to rank 0 by its host name: `ok` or an error."""
    requeue: str = ""
    """Result of `scontrol requeue`: `ok`, or the scheduler's message. Empty: not tried."""


# --- inside the job --------------------------------------------------------------------------------------------------


def probe(run_dir: Path) -> Path:
    """Run all probes in this process of the job and write its report.

    All processes of the job must call this, because some probes wait for each other, for at most `MEET_S` each.

    Args:
        run_dir: Folder that all processes share, without a report of an earlier job.

    Returns:
        The report's file.
    """
    me, size = rank(), world_size()
    folder = run_dir / "doctor"
    folder.mkdir(parents=True, exist_ok=True)
    # Before the other probes, because the job starts from the beginning if the requeue succeeds.
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
    """Wait until all files exist, which are in one folder; False if they do not after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        # An NFS client caches that a file does not exist; listing its folder refreshes the cache.
        with contextlib.suppress(OSError):
            os.listdir(paths[0].parent)
        if all(path.exists() for path in paths):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _try_requeue(folder: Path, me: int) -> str:
    """On SLURM, requeue the job once, because nothing else proves that users may do that."""
    job = os.environ.get("SLURM_JOB_ID")
    mark = folder / "requeue"
    if not job or "SLURM_STEP_ID" not in os.environ:
        return ""
    # This is the second start of the job, so the requeue in the first one worked.
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        return "ok"
    if me == 0:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if done.returncode:
            write_atomic(mark, scheduler_message(done.stderr or done.stdout))
    # After an accepted requeue, SLURM ends the job while it waits here. After a refusal, all ranks read rank 0's file.
    return mark.read_text(encoding="utf-8") if _wait_for([mark]) else "accepted, and the job was not restarted"


def _lock(folder: Path, me: int) -> str:
    """Rank 0 holds a lock while every process, rank 0 included, tries to take it."""
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
    except Exception as error:  # any error of the file system is a result of this probe
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
    # With the process's default group, the file would have the right group even if setgid did not work.
    others = [group for group in os.getgroups() if group != os.getegid()] or [os.getegid()]
    try:
        os.chown(shared, -1, others[0])
        shared.chmod(0o2770)
        path = write_atomic(shared / "file", "x")
    except OSError as error:
        return f"not tried: {error.strerror}"
    group = path.stat().st_gid
    if group == others[0]:
        return "kept"
    try:
        return f"lost: {grp.getgrgid(group).gr_name}"
    except KeyError:  # containers often have no names for the host's groups
        return f"lost: {group}"


def _is_local(name: str) -> bool:
    """Whether a folder, or its parent if it does not exist yet, is on the node's local disk and writable."""
    with contextlib.suppress(KeyError, OSError):  # containers often have no names for the host's users
        name = name.replace("$USER", getpass.getuser())
    expanded = os.path.expandvars(name)
    if "$" in expanded:
        return False
    path = Path(expanded)
    path = path if path.is_dir() else path.parent
    return path != Path("/") and os.access(path, os.W_OK) and file_system(path) not in {*NETWORK, "tmpfs", "ramfs"}


def _interfaces() -> dict[str, str]:
    """IPv4 address of every network interface except loopback, from lines like `2: ib0    inet 10.0.0.7/24 ...`."""
    if not shutil.which("ip"):
        return {}
    listing = subprocess.run(["ip", "-4", "-o", "addr", "show", "up"], capture_output=True, text=True, check=False)
    lines = [line.split() for line in listing.stdout.splitlines()]
    return {fields[1]: fields[3].partition("/")[0] for fields in lines if len(fields) > 3 and fields[1] != "lo"}


def _reach(folder: Path, me: int, size: int) -> str:
    """Connect to rank 0 by its host name, as the ranks of torchrun do; on rank 0, accept these connections."""
    address = folder / "address"
    if me == 0:
        # Rank 0 listens on all interfaces, as torchrun does. What is tested is whether its host name resolves to an
        # interface that the other nodes can reach.
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
