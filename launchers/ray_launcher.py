"""Ray: a single job as a `TorchTrainer` (`ray_train.py`), and the tasks of a fan-out as tasks of one Ray job.

Ray schedules processes, detects lost ones and restarts them. Each Ray worker runs `fine_dist.worker` in a child
process, because the engine needs signals and the main thread, which Ray uses in its workers. The child is killed when
Ray's worker ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.launch_target import register
from fine_dist.launchers.launcher import Job, Launcher
from fine_dist.launchers.local import ForkServer
from fine_dist.launchers.machine import VISIBLE
from fine_dist.launchers.ray_cluster import (
    address_of,
    check_storage,
    connect,
    copies,
    demand,
    grows,
    inside_ray,
    nodes,
    one_rank,
    resources_of,
)
from fine_dist.launchers.ray_train import TrainerThread
from fine_dist.launchers.spec import Capacity, Finding, JobSpec


@register
class RayLauncher(Launcher):
    """Jobs on the Ray cluster at `needs.address`, at RAY_ADDRESS, or of the Ray job that this process is in.

    Raises:
        LaunchError: There is no such cluster.
    """

    name = "ray"

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        super().__init__(needs)
        self._connected = connect(self.needs.address)
        self._max_parallel: int | None = None
        self._many = False  # tasks of a fan-out are Ray tasks; a single job is a trainer
        self._next_resize = 0.0

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        return not address_of(needs).startswith("http")

    @classmethod
    def affinity(cls, needs: LaunchConfig) -> int:
        return 30 if inside_ray() else 0

    def fits(self, spec: JobSpec) -> int:
        """Number of such jobs that the nodes hold at once; at least 1, because an autoscaler may add a node."""
        return max(1, sum(copies(node, demand(spec)) for node in nodes()))

    def capacity(self, spec: JobSpec, many: bool = True) -> Capacity:
        capacity = super().capacity(spec, many)
        shares = [node["memory"] / (copies(node, demand(spec)) if many else 1) for node in nodes()
                if node.get("memory") and copies(node, demand(spec))]  # fmt: skip
        return replace(capacity, host_bytes=capacity.host_bytes or min(shares, default=None))

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        """Whether the nodes have the job's resources. With an autoscaler, missing resources are a note."""
        options = demand(spec) if many else demand(one_rank(spec))
        counts = [copies(node, options) for node in nodes()]
        enough = max(counts, default=0) >= 1 if many else sum(counts) >= spec.world_size
        if "/working_dir_files/" in spec.run_dir:
            text = f"{spec.run_dir} is in a folder that Ray deletes; give an absolute run_dir on shared storage"
            return [Finding("storage", "stop", text)]
        request = ", ".join(f"{key} {value:g}" for key, value in resources_of(options).items())
        if enough:
            return [Finding("ray", "ok", f"{len(counts)} nodes run {sum(counts)} at once of ({request})")]
        what = "no node can run one task" if many else f"{spec.world_size} processes, the nodes run {sum(counts)}"
        text = f"{what} of ({request}); lower launch.cpus, gpus, memory_gb, processes or nodes, or add nodes"
        if grows():
            return [Finding("ray", "note", f"{text}; the autoscaler may add them")]
        return [Finding("ray", "stop", text)]

    def submit_many(self, specs: Sequence[JobSpec], max_parallel: int | None = None, retries: int = 0) -> list[Job]:
        for run_dir in {spec.table or spec.run_dir for spec in specs}:
            check_storage(Path(run_dir))
        self._max_parallel = max_parallel
        self._many = True
        return super().submit_many(specs, max_parallel, retries)

    def poll(self) -> None:
        if time.monotonic() > self._next_resize and (self._queue or self._live):  # nodes come and go
            self._next_resize = time.monotonic() + 5.0
            spec = (self._queue or self._live)[0].spec
            # Two more than fit are submitted, because an autoscaler reacts to waiting tasks.
            self._width = min(self._max_parallel or sys.maxsize, self.fits(spec) + 2)
        super().poll()

    def close(self) -> None:
        import ray

        super().close()
        if self._connected and ray.is_initialized():
            ray.shutdown()

    def _start(self, job: Job) -> None:
        job.id = f"ray {job.spec.name}"
        if not self._many:
            job.handle = TrainerThread(job, self.needs)
            return
        import ray

        # Ray's retries are off, because the queue in `Launcher` counts the attempts.
        run = ray.remote(run_task).options(**demand(job.spec), max_retries=0, name=job.spec.name)
        job.handle = run.remote(str(job.file), str(job.log))

    def _check(self, job: Job) -> bool:
        if isinstance(job.handle, TrainerThread):
            return job.handle.check(job)
        import ray

        assert isinstance(job.handle, ray.ObjectRef)
        if not ray.wait([job.handle], timeout=0)[0]:
            return False
        try:
            job.code = int(ray.get(job.handle))
        # Ray's memory monitor kills the worker. 137 is 128 + SIGKILL, the code that shells report for it.
        except ray.exceptions.OutOfMemoryError:
            job.code, job.reason = 137, "ended by Ray because its node ran out of memory; raise launch.memory_gb"
        except ray.exceptions.RayTaskError as error:
            job.code, job.reason = 1, str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            # No exit code: the task was lost with its node, and a restart does not count as an attempt.
            job.code, job.reason = None, f"lost: {type(error).__name__}"
        return True

    def _stop(self, job: Job) -> None:
        import ray

        if isinstance(job.handle, TrainerThread):
            job.handle.stop()
        elif ray.is_initialized():
            ray.cancel(job.handle, force=True)


# --- one task of a fan-out -----------------------------------------------------------------------------------------

_servers: dict[str | None, ForkServer] = {}


def run_task(file: str, log: str) -> int:
    """Inside a Ray worker: run one job in forked processes; returns the exit code.

    Results are written to the run directory. The fork server is reused by the next task of this worker.

    Args:
        file: The job file.
        log: File for the output.
    """
    spec = JobSpec.load(file)
    server = _servers.get(spec.code)
    if server is None or not server.alive:
        server = _servers[spec.code] = ForkServer(spec, spec.cpus_per_process)
    group = server.group(spec, Path(file), Path(log), env={"RAY_JOB_ID": _ray_job(), **_devices(spec)})
    while not group.ended():
        time.sleep(0.005)
    return group.code


def _ray_job() -> str:
    import ray

    return str(ray.get_runtime_context().get_job_id())


def _devices(spec: JobSpec) -> dict[str, str]:
    """The accelerators that Ray assigned to this task, as environment variables.

    Ray reuses a worker for many tasks and sets CUDA_VISIBLE_DEVICES for each, but the fork server has the environment
    of the first task, so that the variable must be passed to each job.
    """
    import ray

    if not spec.accelerators_per_node:
        return {name: os.environ[name] for name in VISIBLE if name in os.environ}
    return {"CUDA_VISIBLE_DEVICES": ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])}
