"""A real SLURM cluster of virtual nodes on this machine, for tests and for trying things out.

    python slurm/local_cluster.py              four nodes until Ctrl-C; prints what to export in another terminal

It needs root and Debian's packages `slurm-wlm slurmdbd munge mariadb-server-core`; it uses neither systemd nor cgroups.
Every node is a `slurmd` in its own PID and host-name namespace, so that killing this one process ends all processes of
the node, as a power cut would. All ports are bound to loopback, all files are in one folder, and all processes end with
this program, even if it is killed. Outside of the folder, only a few tagged lines in /etc/hosts are changed meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this script runs without an installation

from fine_dist.core.locks import locked
from fine_dist.core.processes import die_with_parent, free_ports

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "unshare")
HOSTS = Path("/etc/hosts")
CPUS = 8
"""Number of CPUs that a node claims to have."""
MEMORY_MB = 8000
"""Memory in MiB that a node claims to have."""
_PATH = os.pathsep.join(dict.fromkeys([*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"]))


def missing() -> str | None:
    """Why no cluster can start on this machine, or None."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    if absent:
        packages = "apt-get install slurm-wlm slurmdbd munge mariadb-server-core"
        return f"SLURM is not installed ({', '.join(absent)} not found): {packages}"
    if os.geteuid() != 0:
        return "a local SLURM cluster needs root (namespaces and /etc/hosts)"
    probe = subprocess.run(
        ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True, check=False
    )
    return f"namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else None


class LocalSlurm:
    """One cluster, as a context manager. It ends with the thread that started it, so use it from the main thread.

    Args:
        nodes: Number of virtual nodes, which are called n1, n2, ...
        folder: Folder for all files. None: a new one, which is removed at the end.
        conf: Lines KEY=VALUE of slurm.conf; each replaces the default lines of its key.
    """

    def __init__(self, nodes: int = 4, folder: str | None = None, conf: tuple[str, ...] = ()) -> None:
        self._extra = conf
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self._own_folder = folder is None
        self.folder = Path(folder or tempfile.mkdtemp(prefix="slurm-"))
        self.conf = self.folder / "slurm.conf"
        self._tag = f"# local slurm {self.folder} {os.getpid()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = free_ports(2 + nodes)

    @property
    def env(self) -> dict[str, str]:
        """Environment variables by which SLURM's commands find this cluster."""
        return {"SLURM_CONF": str(self.conf), "PATH": _PATH}

    def start(self) -> LocalSlurm:
        """Start all programs and wait until every node is idle.

        Raises:
            RuntimeError: A program ended or took too long; the message has the ends of the logs.
        """
        try:
            self._write()
            _edit_hosts(self._tag, [f"127.0.0.1 {name}" for name in self.nodes])
            self._start_database()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self._await(lambda: self._idle() == len(self.nodes), "nodes to be idle")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process and remove every change. May be called twice."""
        for name in reversed(list(self._processes)):
            self.kill(name)
        _edit_hosts(self._tag, [])
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalSlurm:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # --- faults

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End one program with a signal and wait for it. Does nothing if it does not run.

        Args:
            name: A node, `slurmctld`, `slurmdbd`, `mariadbd` or `munged`.
            number: Number of the signal. With SIGKILL, all processes of a node end at once.
        """
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(number)
            process.wait()

    def start_node(self, name: str) -> None:
        """Start a node that is not running."""
        command = f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; exec slurmd -D -N {name} -f {self.conf}"
        isolation = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        self._spawn(name, [*isolation, "bash", "-c", command])

    def start_controller(self) -> None:
        """Start slurmctld and wait until it answers."""
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        self._await(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands on this cluster, for at most 60 s."""
        env = {**os.environ, **self.env}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)

    # --- parts

    def _spawn(self, name: str, command: list[str], **env: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env={**os.environ, **self.env, **env}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                cwd=self.folder, preexec_fn=die_with_parent, start_new_session=True,
            )  # fmt: skip

    def _await(self, ready: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        """Wait until `ready()`; RuntimeError when a program has ended or the time is over."""
        deadline = time.monotonic() + seconds
        while not ready():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(f"== {path.name}\n{_tail(path)}" for path in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"waited for {what}; ended: {dead or 'none'}\n{logs}")
            time.sleep(0.03)

    def _idle(self) -> int:
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N").stdout.count("\n")

    def _start_database(self) -> None:
        """Start munged, and slurmdbd with its database."""
        data = self.folder / "mysql"
        # An empty system schema is enough, because --skip-grant-tables reads no accounts. Only the socket is served.
        (data / "mysql").mkdir(parents=True)
        command = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--innodb-doublewrite=0"]
        command += ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0"]
        database = self.folder / "mysql.sock"
        command += [f"--socket={database}", "--skip-networking", "--skip-grant-tables"]
        self._spawn("mariadbd", [*command, f"--pid-file={self.folder}/mysql.pid"])
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files.items()]
        self._spawn("munged", ["munged", "--foreground", *options])
        self._await(lambda: database.exists() and (self.folder / "munge.sock").exists(), "mariadbd and munged")
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(database))
        self._await(lambda: _listening(self._ports[1]), "slurmdbd")

    def _write(self) -> None:
        """Write the configuration files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        folder, (ctld, dbd, *ports), host = self.folder, self._ports, socket.gethostname().partition(".")[0]
        socket_path = f"socket={folder}/munge.sock"
        (folder / "slurmdbd.conf").write_text(f"""\
AuthType=auth/munge
AuthInfo={socket_path}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
""")
        (folder / "slurmdbd.conf").chmod(0o600)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={ports[i]} CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:2 State=UNKNOWN"
            for i, name in enumerate(self.nodes)
        )
        text = f"""\
ClusterName=laptop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo={socket_path},cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1,default_queue_depth=1000,bf_max_job_test=1000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=1001
MinJobAge=3600
KillWait=10
OverTimeLimit=0
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=5
InactiveLimit=0
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.sock
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 MaxTime=120 DefaultTime=30 GraceTime=20
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=120 DefaultTime=30
"""
        replaced = tuple(line.partition("=")[0] + "=" for line in self._extra)
        kept = [line for line in text.splitlines() if not replaced or not line.startswith(replaced)]
        self.conf.write_text("\n".join([*kept, *self._extra]) + "\n")


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-1500:]


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _edit_hosts(tag: str, lines: list[str]) -> None:
    """Replace the lines of one cluster in /etc/hosts."""
    # The file is changed in place, because in a container it is often a mount, onto which no file can be renamed.
    with locked(HOSTS), open(HOSTS, "r+") as file:
        kept = [line for line in file.read().splitlines() if not line.endswith(tag) and not _stale(line)]
        text = "".join(f"{line}\n" for line in [*kept, *(f"{line} {tag}" for line in lines)])
        file.seek(0)
        file.write(text)
        file.truncate()


def _stale(line: str) -> bool:
    """Whether the line is of a cluster whose program was killed before it could clean up; then remove its folder."""
    _, mark, rest = line.partition("# local slurm ")
    folder, _, pid = rest.rpartition(" ")
    if not mark or Path("/proc", pid).exists():
        return False
    if Path(folder).name.startswith("slurm-"):
        shutil.rmtree(folder, ignore_errors=True)
    return True


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4, help="number of virtual nodes (default: 4)")
    parser.add_argument("--folder", help="folder for all files (default: a new one, removed at the end)")
    parser.add_argument(
        "--conf", action="append", default=[], metavar="KEY=VALUE", help="line of slurm.conf, in place of the default"
    )
    # Reads lines such as `kill n2` and answers in JSON; see tests/cluster/conftest.py.
    parser.add_argument("--pipe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    reason = missing()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    # SystemExit leaves the context below, which ends the cluster. 143 is 128 + SIGTERM, the code that shells report.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.monotonic()
    with LocalSlurm(args.nodes, args.folder, tuple(args.conf)) as cluster:
        if args.pipe:
            return _serve(cluster, begun)
        print(f"SLURM with {args.nodes} nodes is up after {time.monotonic() - begun:.1f} s; in another terminal:\n")
        print(f"  export SLURM_CONF={cluster.conf}\n  sinfo\n\nCtrl-C ends it and its jobs.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


def _serve(cluster: LocalSlurm, begun: float) -> int:
    """Execute lines such as `kill n2` until the input ends, which also happens when the parent is killed."""
    ready = {"env": cluster.env, "folder": str(cluster.folder), "seconds": time.monotonic() - begun}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        verb, name = line.split()
        if verb in ("kill", "stop"):
            cluster.kill(name, signal.SIGKILL if verb == "kill" else signal.SIGTERM)
        elif verb == "start":
            cluster.start_controller() if name == "slurmctld" else cluster.start_node(name)
        print(json.dumps({"ok": line.strip()}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
