"""A real Ray cluster of several nodes on this machine, for tests and trials.

    python -m fine_dist.launchers.local_ray              a head and one more node until Ctrl-C

Everything is bound to loopback and lives in one folder; its processes end with this program, however it ends.
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

SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_period_ms": "1000",
    "RAY_worker_niceness": "0",  # Ray's own is 15: any other process of this machine would leave workers almost no CPU
    "RAY_memory_monitor_refresh_ms": "0",  # the machine's memory is not this cluster's
}
HEAD = "127.0.0.2"
"""Ray replaces 127.0.0.1 by an address of the machine; other loopback addresses it takes as they are."""


class LocalRay:
    """One cluster. Use it as a context manager, from the process that will end it.

    Args:
        nodes: Number of nodes, the head included; each has its own CPUs and object store.
        cpus: Number of CPUs that a node claims to have.
        gpus: Number of accelerators that a node claims to have, whatever the machine has.
    """

    def __init__(self, nodes: int = 2, cpus: int = 4, gpus: int = 0) -> None:
        self._nodes, self._cpus, self._gpus = nodes, cpus, gpus
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Unix sockets live in it
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port, self.dashboard = free_ports(2)
        self._boxed = _may_box()

    @property
    def env(self) -> dict[str, str]:
        """Variables by which a client finds this cluster; `RAY_ADDRESS` makes `--launcher auto` choose it."""
        return {**SETTINGS, "RAY_ADDRESS": f"{HEAD}:{self.port}"}

    @property
    def api(self) -> str:
        """Address of Ray Jobs."""
        return f"http://{HEAD}:{self.dashboard}"

    def start(self) -> LocalRay:
        """Start all nodes and wait for them. `RuntimeError` with the logs when one does not come up."""
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
        """Start a node; `head` first."""
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
        ]
        command += [
            f"--temp-dir={self.folder / name}",
            "--object-store-memory=100000000",
            f"--resources={json.dumps({name: 100})}",
        ]
        if name == "head":
            command += ["--head", f"--port={self.port}", "--include-dashboard=true"]
            command += [f"--dashboard-host={HEAD}", f"--dashboard-port={self.dashboard}"]
        else:
            command += [f"--address={HEAD}:{self.port}"]
        if self._boxed:  # with a PID namespace, killing one process is a power cut
            command = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", *command]

        # A node that inherits RAY_ADDRESS would join that cluster instead of forming this one.
        env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_JOB_ID")}
        env["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", "")])  # jobs run this `python`
        with open(self.folder / f"{name}.out", "ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env={**env, **SETTINGS}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                cwd=self.folder, preexec_fn=die_with_parent, start_new_session=True,
            )  # fmt: skip
        if name == "head":
            self._await(0)

    def kill(self, name: str) -> None:
        """A power cut of one node."""
        process = self._processes.pop(name, None)
        if process is None:
            return
        # Listed before the kill: orphans are given to init and cannot be found by their parent any more.
        descendants = [] if self._boxed else _descendants(process.pid)
        process.kill()
        process.wait()
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End every process, remove every file. Safe to call twice."""
        for name in reversed(list(self._processes)):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalRay:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _await(self, wanted: int, seconds: float = 60.0) -> None:
        """Until GCS answers, and knows so many nodes."""
        deadline = time.monotonic() + seconds
        while True:
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if await_nodes(f"{HEAD}:{self.port}", wanted, 0.5):
                return
            if dead or time.monotonic() > deadline:
                logs = "\n".join(
                    f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*.out")
                )
                raise RuntimeError(f"Ray did not start; ended: {dead or 'none'}\n{logs}")


def _may_box() -> bool:
    words = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True, check=False).returncode == 0


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def await_nodes(address: str, count: int, seconds: float = 120.0) -> bool:
    """Whether so many nodes of a cluster are alive within some seconds."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # it may not answer yet
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
    parser.add_argument("--pipe", action="store_true", help=argparse.SUPPRESS)  # JSON lines: see tests/cluster/conftest
    parser.add_argument("--await-nodes", type=int, metavar="N", help="only wait until the cluster at RAY_ADDRESS has N")
    args = parser.parse_args()
    if args.await_nodes:
        return 0 if await_nodes(os.environ["RAY_ADDRESS"], args.await_nodes) else 1
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
