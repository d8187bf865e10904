"""Inside a SLURM allocation (salloc, or a batch script): every job is an `srun` step of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from fine_dist.errors import LaunchError
from fine_dist.jobs import JobSpec
from launchers.base import Job, Launcher

GRACE_S = 60.0


class StepLauncher(Launcher):
    """Steps of the allocation this process runs in; they end with it."""

    name = "slurm"

    def fits(self, spec: JobSpec) -> int:
        env = os.environ
        cpus = sum(_counts(env.get("SLURM_JOB_CPUS_PER_NODE", "1")))
        return max(1, min(cpus // (spec.world_size * spec.cpus_per_process), _nodes() * 64 // spec.nodes))

    def _start(self, job: Job) -> None:
        spec = job.spec
        if spec.nodes > _nodes():
            raise LaunchError(f"{spec.name} wants {spec.nodes} nodes and this allocation has {_nodes()}")
        command = ["srun", "--kill-on-bad-exit=1", "--exact", f"--nodes={spec.nodes}", f"--ntasks={spec.world_size}"]
        command += [f"--ntasks-per-node={spec.processes_per_node}", f"--cpus-per-task={spec.cpus_per_process}"]
        command += [f"--job-name={spec.name}", f"--output={job.log}", "--open-mode=append"]
        if spec.accelerators_per_node:
            command.append(f"--gpus-per-node={int(-(-spec.accelerators_per_node // 1))}")
        whole = os.environ.get("SLURM_MEM_PER_NODE")
        if spec.memory_gb:
            command.append(f"--mem={round(spec.memory_gb * 1024)}M")
        elif whole:  # a step takes all memory of its nodes unless told, and the next one waits
            command.append(f"--mem={int(whole) // max(1, min(self._width, self.fits(spec)))}M")
        env = {**os.environ, **spec.env}
        if spec.code:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [spec.code, env.get("PYTHONPATH")]))
        command += [sys.executable, "-u", "-m", "fine_dist.worker", str(job.file)]
        job.handle = subprocess.Popen(command, env=env, cwd=spec.code or spec.cwd, stdin=subprocess.DEVNULL)
        job.id = f"{os.environ['SLURM_JOB_ID']} step of process {job.handle.pid}"

    def _check(self, job: Job) -> bool:
        job.code = job.handle.poll()
        return job.code is not None

    def _tell(self, job: Job) -> None:
        job.handle.send_signal(signal.SIGUSR1)  # srun passes it to its tasks, and does not end before them

    def _stop(self, job: Job) -> None:
        process: subprocess.Popen[bytes] = job.handle
        self._tell(job)
        deadline = time.monotonic() + GRACE_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()


def _nodes() -> int:
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def _counts(text: str) -> list[int]:
    """`8(x2),4` is 8, 8, 4."""
    found = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return found
