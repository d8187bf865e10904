"""Inside a SLURM allocation (salloc, or a batch script), where every job is an `srun` step."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

from fine_dist.core.errors import LaunchError
from fine_dist.core.processes import int_from_env
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.launch_target import register
from fine_dist.launchers.launcher import Job, Launcher
from fine_dist.launchers.site import SlurmSite
from fine_dist.launchers.slurm_queue import Node, fits_on, refuse_pattern
from fine_dist.launchers.spec import Capacity, JobSpec

GRACE_S = 60.0
"""Seconds that a step has to save before its srun is killed."""


@register
class StepLauncher(Launcher):
    """Jobs as steps of the allocation that this process is in. They end when the allocation ends."""

    name = "slurm"

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        return "SLURM_JOB_ID" in os.environ

    @classmethod
    def affinity(cls, needs: LaunchConfig) -> int:
        return 20

    def fits(self, spec: JobSpec) -> int:
        env = os.environ
        nodes = [
            Node(cpus, int_from_env(env, "SLURM_MEM_PER_NODE", 0) or None, _gpus())
            for cpus in _counts(env.get("SLURM_JOB_CPUS_PER_NODE", "1"))
        ]
        return fits_on(nodes, spec)

    def capacity(self, spec: JobSpec, many: bool = True) -> Capacity:
        capacity = super().capacity(spec, many)
        node_mb = int_from_env(os.environ, "SLURM_MEM_PER_NODE", 0)
        if node_mb and not capacity.host_bytes:
            # Rounded up, because the node with the most tasks has the least memory for each.
            tasks_per_node = max(1, -(-capacity.workers // _nodes()))
            capacity = replace(capacity, host_bytes=node_mb * 2**20 / tasks_per_node)
        return capacity

    def _start(self, job: Job) -> None:
        spec = job.spec
        if spec.nodes > _nodes():
            raise LaunchError(f"{spec.name} wants {spec.nodes} nodes and this allocation has {_nodes()}")
        refuse_pattern(job.log)
        site = SlurmSite.here()
        command = [
            "srun",
            *site.srun_args,
            "--export=ALL",
            "--kill-on-bad-exit=1",
            "--exact",
            f"--nodes={spec.nodes}",
            f"--ntasks={spec.world_size}",
        ]
        command += [f"--ntasks-per-node={spec.processes_per_node}", f"--cpus-per-task={spec.cpus_per_process}"]
        command += [f"--job-name={spec.name}", f"--output={job.log}", "--open-mode=append"]
        if spec.accelerators_per_node:
            # Each step requests its share of the allocation's accelerators, as it does for cores and memory.
            command.append(site.gpu_flag(spec.accelerators_per_node, spec.processes_per_node))
        node_mb = int_from_env(os.environ, "SLURM_MEM_PER_NODE", 0)
        if spec.memory_gb:
            command.append(f"--mem={round(spec.memory_gb * 1024)}M")
        elif node_mb:  # without --mem a step takes all memory of its nodes, and the next step waits for it
            command.append(f"--mem={node_mb // max(1, min(self._width, self.fits(spec)))}M")
        env = {**os.environ, **site.environment(), **spec.env}
        if spec.code:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [spec.code, env.get("PYTHONPATH")]))
        command += [*shlex.split(site.wrapper), sys.executable, "-u", "-m", "fine_dist.worker", str(job.file)]
        # srun forwards signals to all ranks, waits for them and returns their highest exit code (man srun), so its
        # process represents the job.
        process = subprocess.Popen(command, env=env, cwd=spec.code or spec.cwd, stdin=subprocess.DEVNULL)
        job.handle = process
        job.id = f"{os.environ['SLURM_JOB_ID']} step of process {process.pid}"

    def _check(self, job: Job) -> bool:
        job.code = _srun_of(job).poll()
        return job.code is not None

    def _request_stop(self, job: Job) -> None:
        _srun_of(job).send_signal(signal.SIGUSR1)  # srun forwards it to its tasks and continues to wait for them

    def _stop(self, job: Job) -> None:
        process = _srun_of(job)
        self._request_stop(job)
        deadline = time.monotonic() + GRACE_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()


def _srun_of(job: Job) -> subprocess.Popen[bytes]:
    assert isinstance(job.handle, subprocess.Popen)
    return job.handle


def _gpus() -> int:
    """Number of accelerators on a node of this allocation."""
    return int_from_env(os.environ, "SLURM_GPUS_ON_NODE", 0)


def _nodes() -> int:
    """Number of nodes of this allocation."""
    return int_from_env(os.environ, "SLURM_JOB_NUM_NODES", 1, least=1)


def _counts(text: str) -> list[int]:
    """Expand SLURM's compressed list of counts: `8(x2),4` is 8, 8, 4."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts
