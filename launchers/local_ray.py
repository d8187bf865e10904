"""A real Ray cluster of several nodes on this machine, for tests and trials.

    python -m fine_dist.launchers.local_ray              a head and one more node until Ctrl-C

All ports are bound to loopback addresses, and all files are in one folder. The cluster's processes end with this
program, even if it is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from fine_dist.core.processes import die_with_parent, free_ports

UNSHARE = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
"""Runs the rest of the command line in a PID namespace, whose processes all end when its first one is killed."""
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_period_ms": "1000",
    "RAY_worker_niceness": "0",  # the default of 15 leaves workers almost no CPU next to other processes
    "RAY_memory_monitor_refresh_ms": "0",  # other processes use the machine's memory too; Ray would kill workers for it
}
"""Environment variables of the nodes and of the clients."""
HEAD = "127.0.0.2"
"""Address of the head node. Ray replaces 127.0.0.1 with an address of the machine, but uses this one as it is."""


class LocalRay:
    """One cluster, as a context manager. It ends with the thread that started it, so use it from the main thread.

    Args:
        nodes: Number of nodes, the head included; each has its own CPUs and object store.
        cpus: Number of CPUs that a node claims to have.
        gpus: Number of accelerators that a node claims to have, which the machine need not have.

    Attributes:
        folder: Folder of the cluster's files.
        port: Port of the head's GCS (global control service).
        dashboard: Port of the dashboard and of Ray Jobs.
    """

    def __init__(self, nodes: int = 2, cpus: int = 4, gpus: int = 0) -> None:
        self._nodes, self._cpus, self._gpus = nodes, cpus, gpus
        # A short path, because Ray puts Unix sockets into it, whose paths are limited to 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, self.dashboard = free_ports(2)
        self._isolated = _can_unshare()

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of a client of this cluster; `RAY_ADDRESS` makes `--launcher auto` choose it."""
        return {**SETTINGS, "RAY_ADDRESS": f"{HEAD}:{self.port}"}

    @property
    def api(self) -> str:
        """HTTP address of Ray Jobs."""
        return f"http://{HEAD}:{self.dashboard}"

    def start(self) -> LocalRay:
        """Start all nodes and wait until they have registered.

        Raises:
            RuntimeError: A node ended, or did not register within a minute; the message has the ends of the logs.
        """
        try:
            self.start_node("head")
            for i in range(1, self._nodes):
                self.start_node(f"node{i}")
            self._await(self._nodes)
        except BaseException:
            self.stop()
            raise
        return self

    def start_node(self, name: str) -> None:
        """Start a node.

        Args:
            name: `head`, which is started first, or `node1`, `node2`, ...
        """
        address = HEAD if name == "head" else f"127.0.0.{int(name.removeprefix('node')) + 2}"
        ray = str(Path(sysconfig.get_path("scripts"), "ray"))
        command = [
            ray,
            "start",
            "--block",
            f"--node-ip-address={address}",
            f"--num-cpus={self._cpus}",
            f"--num-gpus={self._gpus}",
            "--disable-usage-stats",
            f"--temp-dir={self.folder / name}",
            "--object-store-memory=100000000",
            f"--resources={json.dumps({name: 100})}",
        ]
        if name == "head":
            command += ["--head", f"--port={self.port}", "--include-dashboard=true"]
            command += [f"--dashboard-host={HEAD}", f"--dashboard-port={self.dashboard}"]
        else:
            command += [f"--address={HEAD}:{self.port}"]
        if self._isolated:  # so that `kill` ends all processes of the node at once
            command = [*UNSHARE, *command]
        # A node that inherits RAY_ADDRESS would join that cluster instead of forming this one.
        env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_JOB_ID")}
        # Jobs that run `python` must get this interpreter.
        env["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", "")])
        with open(self.folder / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env={**env, **SETTINGS}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                cwd=self.folder, preexec_fn=die_with_parent, start_new_session=True,
            )  # fmt: skip
        if name == "head":
            self._await(0)

    def kill(self, name: str) -> None:
        """Kill all processes of a node, as a power cut would. Does nothing if the node does not run."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        # Listed before the kill, because orphans become children of init and cannot be found by their parent.
        descendants = [] if self._isolated else _descendants(process.pid)
        process.kill()
        process.wait()
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill every process and remove every file. May be called twice."""
        for name in reversed(list(self._processes)):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalRay:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _await(self, count: int, seconds: float = 60.0) -> None:
        """Wait until the GCS answers and `count` nodes have registered; RuntimeError if that fails."""
        deadline = time.monotonic() + seconds
        while True:
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if await_nodes(f"{HEAD}:{self.port}", count, 0.5):
                return
            if dead or time.monotonic() > deadline:
                logs = "\n".join(
                    f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*.out")
                )
                raise RuntimeError(f"Ray did not start; ended: {dead or 'none'}\n{logs}")


def _can_unshare() -> bool:
    """Whether this process may create PID namespaces, which usually takes root."""
    if not shutil.which(UNSHARE[0]):
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def await_nodes(address: str, count: int, seconds: float = 120.0) -> bool:
    """Wait until nodes have registered with a cluster. Nodes that have died since are counted as well.

    Args:
        address: Address of the GCS, as HOST:PORT.
        count: Minimum number of nodes.
        seconds: Time to wait.

    Returns:
        Whether at least `count` nodes registered in that time.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # a GCS that has not started yet gives errors of several kinds
            if len(GcsClient(address=address).get_all_node_info()) >= count:
                return True
        time.sleep(0.2)
    return False


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes, the head included (default: 2)")
    parser.add_argument("--cpus", type=int, default=4, help="CPUs that each node claims to have (default: 4)")
    parser.add_argument("--gpus", type=int, default=0, help="accelerators that each node claims to have (default: 0)")
    # Reads lines such as `kill node1` and answers in JSON; see tests/cluster/conftest.py.
    parser.add_argument("--pipe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--await-nodes", type=int, metavar="N", help="only wait until the cluster at RAY_ADDRESS has N")
    args = parser.parse_args()
    if args.await_nodes:
        return 0 if await_nodes(os.environ["RAY_ADDRESS"], args.await_nodes) else 1
    # SystemExit leaves the context below, which ends the cluster. 143 is 128 + SIGTERM, the code that shells report.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begun = time.monotonic()
    with LocalRay(args.nodes, args.cpus, args.gpus) as cluster:
        seconds = time.monotonic() - begun
        if args.pipe:
            about = {"env": cluster.env, "folder": str(cluster.folder), "seconds": seconds, "api": cluster.api}
            print(json.dumps(about), flush=True)
            for line in sys.stdin:
                verb, name = line.split()
                cluster.kill(name) if verb == "kill" else cluster.start_node(name)
                print(json.dumps({"ok": line.strip()}), flush=True)
            return 0
        print(
            f"Ray with {args.nodes} nodes is up after {seconds:.1f} s, dashboard {cluster.api}; in another terminal:\n"
        )
        print("\n".join(f"  export {key}={value}" for key, value in cluster.env.items()))
        print("  ray status\n\nCtrl-C ends it and its jobs.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
