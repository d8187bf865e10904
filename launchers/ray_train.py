"""Ray: one job as a `TorchTrainer`, and a fan-out as tasks of one Ray job.

Ray schedules processes, detects lost ones and starts them again. The work itself is always `fine_dist.worker` in a
process of its own, so that signals reach it and its environment is clean; it dies with Ray's worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fine_dist.core.errors import EXIT_RESUME, EXIT_TASKS_FAILED, EXIT_USER_ERROR, LaunchError
from fine_dist.core.processes import free_port, rank_words
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.launcher import Job, Launcher, register
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
from fine_dist.launchers.spec import Capacity, Finding, JobSpec
from fine_dist.launchers.worker import LIFELINE

QUIET_CODES = (0, EXIT_USER_ERROR, EXIT_TASKS_FAILED, EXIT_RESUME)
"""Exit codes that a restart of the workers would not change; others are failures of the worker group."""
LOOK_EVERY_S = 2.0
"""Seconds between two looks at the child process and at Ray's announcements of preemption."""


@register
class RayLauncher(Launcher):
    """Jobs on the Ray cluster at `needs.address`, at RAY_ADDRESS, or of the Ray job that this process is in.

    Raises:
        LaunchError: There is no such cluster.
    """

    name = "ray"

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        super().__init__(needs)
        self._ours = connect(self.needs.address)
        self._wanted: int | None = None
        self._many = False  # jobs of a fan-out are Ray tasks; a single job is a trainer
        self._next_look = 0.0

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        return not address_of(needs).startswith("http")

    @classmethod
    def affinity(cls, needs: LaunchConfig) -> int:
        return 30 if inside_ray() else 0

    def fits(self, spec: JobSpec) -> int:
        """Number of such jobs that the nodes hold at once; at least 1, since an autoscaler may add a node for it."""
        return max(1, sum(copies(node, demand(spec)) for node in nodes()))

    def capacity(self, spec: JobSpec, many: bool = True) -> Capacity:
        capacity = super().capacity(spec, many)
        held = [node["memory"] / (copies(node, demand(spec)) if many else 1) for node in nodes()
                if node.get("memory") and copies(node, demand(spec))]  # fmt: skip
        return replace(capacity, host_bytes=capacity.host_bytes or min(held, default=None))

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        """Whether the nodes can hold the job. A cluster with an autoscaler may hold later what no node holds now."""
        wanted = demand(spec) if many else demand(one_rank(spec))
        held = [copies(node, wanted) for node in nodes()]
        enough = max(held, default=0) >= 1 if many else sum(held) >= spec.world_size
        if "/working_dir_files/" in spec.run_dir:
            text = f"{spec.run_dir} is in a folder that Ray deletes; give an absolute run_dir on shared storage"
            return [Finding("storage", "stop", text)]
        asks = ", ".join(f"{key} {value:g}" for key, value in resources_of(wanted).items())
        if enough:
            return [Finding("ray", "ok", f"{len(held)} nodes hold {sum(held)} at once of ({asks})")]
        what = "no node holds one task" if many else f"{spec.world_size} processes, the nodes hold {sum(held)}"
        text = f"{what} of ({asks}); lower launch.cpus, gpus, memory_gb, processes or nodes, or add nodes"
        if grows():
            return [Finding("ray", "note", f"{text}; the autoscaler may add them")]
        return [Finding("ray", "stop", text)]

    def submit_many(self, specs: Sequence[JobSpec], max_parallel: int | None = None, retries: int = 0) -> list[Job]:
        for run_dir in {spec.table or spec.run_dir for spec in specs}:
            check_storage(Path(run_dir))
        self._wanted = max_parallel
        self._many = True
        return super().submit_many(specs, max_parallel, retries)

    def poll(self) -> None:
        if time.monotonic() > self._next_look and (self._queue or self._live):  # nodes come and go
            self._next_look = time.monotonic() + 5.0
            spec = (self._queue or self._live)[0].spec
            # Two more than fit are submitted, because an autoscaler acts on tasks that wait.
            self._width = min(self._wanted or sys.maxsize, self.fits(spec) + 2)
        super().poll()

    def close(self) -> None:
        import ray

        super().close()
        if self._ours and ray.is_initialized():
            ray.shutdown()

    def _start(self, job: Job) -> None:
        job.id = f"ray {job.spec.name}"
        if not self._many:
            job.handle = _Training(job, self.needs)
            return
        import ray

        # Ray's own retries are off: the queue in `Launcher` counts attempts the same way for every launcher.
        run = ray.remote(run_task).options(**demand(job.spec), max_retries=0, name=job.spec.name)
        job.handle = run.remote(str(job.file), str(job.log))

    def _check(self, job: Job) -> bool:
        if isinstance(job.handle, _Training):
            return job.handle.check(job)
        import ray

        assert isinstance(job.handle, ray.ObjectRef)
        if not ray.wait([job.handle], timeout=0)[0]:
            return False
        try:
            job.code = int(ray.get(job.handle))
        # Ray's memory monitor ends the worker with SIGKILL, which alone would look like any other crash.
        except ray.exceptions.OutOfMemoryError:
            job.code, job.reason = 137, "ended by Ray because its node ran out of memory; raise launch.memory_gb"
        except ray.exceptions.RayTaskError as error:
            job.code, job.reason = 1, str(error).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            # No exit code means lost with its node, which is restarted without counting as an attempt.
            job.code, job.reason = None, f"lost: {type(error).__name__}"
        return True

    def _stop(self, job: Job) -> None:
        import ray

        if isinstance(job.handle, _Training):
            job.handle.stop()
        elif ray.is_initialized():
            ray.cancel(job.handle, force=True)


# --- one task of a fan-out -----------------------------------------------------------------------------------------

_servers: dict[str | None, ForkServer] = {}


def run_task(file: str, log: str) -> int:
    """Inside a Ray worker: run one job in forked processes; returns the exit code. The result is the run directory.

    The fork server stays for the next task of this worker, so that imports happen once.

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

    Ray reuses a worker for many tasks and changes its environment for each, while the fork server keeps the environment
    of the first: every task must be given its own.
    """
    import ray

    if not spec.accelerators_per_node:
        return {name: os.environ[name] for name in VISIBLE if name in os.environ}
    return {"CUDA_VISIBLE_DEVICES": ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])}


# --- one job as a TorchTrainer -------------------------------------------------------------------------------------


class _Training:
    """A `TorchTrainer` that runs in a thread, so that the launcher can poll it."""

    def __init__(self, job: Job, needs: LaunchConfig) -> None:
        self._outcome: tuple[int | None, str | None] | None = None
        # `trainer.fit` blocks until the end, while the launcher must answer signals and poll.
        self._thread = threading.Thread(target=self._follow, args=(job.spec, str(job.file), needs), daemon=True)
        self._thread.start()

    def check(self, job: Job) -> bool:
        if self._thread.is_alive():
            return False
        job.code, job.reason = self._outcome or (None, "the trainer ended without a result")
        return True

    def stop(self) -> None:
        """Leave the cluster, which ends the trainer's workers and with them their processes."""
        import ray

        ray.shutdown()

    def _follow(self, spec: JobSpec, file: str, needs: LaunchConfig) -> None:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        resources = resources_of(demand(one_rank(spec)))
        storage = Path(spec.run_dir) / "ray"
        storage.mkdir(parents=True, exist_ok=True)
        token = storage / f".storage-{uuid.uuid4().hex}"
        token.touch()
        try:
            trainer = TorchTrainer(
                train_worker,
                train_loop_config={"file": file, "token": str(token)},
                # Ray insists on a process group of its own. Nothing here uses it, and gloo needs no accelerator.
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(
                    num_workers=spec.world_size, use_gpu="GPU" in resources, resources_per_worker=resources,
                    placement_strategy="PACK",
                ),
                run_config=RunConfig(
                    name=f"{spec.name}-{token.name[-8:]}", storage_path=str(storage),
                    # A restarted group resumes from the engine's checkpoint in the run directory, not from Ray's.
                    failure_config=FailureConfig(max_failures=needs.retries),
                    checkpoint_config=CheckpointConfig(num_to_keep=1),
                ),
            )  # fmt: skip
            result = trainer.fit()
            self._outcome = (int((result.metrics or {}).get("code", 0)), None)
        except Exception as error:
            self._outcome = (1, _last_line(error))
        finally:
            token.unlink(missing_ok=True)


def _last_line(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = next(iter(failures.items()))
        return f"rank {rank}: {_last_line(first)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def train_worker(config: dict[str, str]) -> None:
    """Inside Ray Train, on one rank: run the process of the job and report a pointer to its checkpoint.

    The engine saves every rank's part in the run directory and resumes from it by itself. Ray keeps only a pointer, so
    that its `Result` names the run directory.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    spec = JobSpec.load(config["file"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    _check_storage_of_ranks(Path(config["token"]), rank, context.get_world_size())
    meet = {"address": os.environ.get("MASTER_ADDR", "127.0.0.1"), "port": free_port()} if rank == 0 else None
    # The port must be free on rank 0's node, so rank 0 chooses it there.
    meet = broadcast_from_rank_zero(meet)
    words = rank_words(rank, context.get_world_size(), context.get_local_rank(), context.get_local_world_size(), **meet)
    env = {**os.environ, **words, LIFELINE: str(os.getpid())}
    env.setdefault("OMP_NUM_THREADS", str(spec.cpus_per_process))
    if spec.code:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [spec.code, env.get("PYTHONPATH")]))
    command = [sys.executable, "-u", "-m", "fine_dist.worker", config["file"]]
    # A process of its own: Ray owns the main thread and the signal handlers of its worker, and the engine needs both.
    child = subprocess.Popen(command, env=env, cwd=spec.code or spec.cwd, stdin=subprocess.DEVNULL)
    try:
        code = _attend(child, rank, Path(spec.run_dir))
    finally:
        # Also when Ray ends this function by an exception, as it does when another rank has failed.
        child.kill()
        child.wait()
    # An exception is what makes Ray count a failure and restart the group.
    if code not in QUIET_CODES:
        raise RuntimeError(f"rank {rank} on {socket.gethostname()} ended with code {code}")
    with tempfile.TemporaryDirectory() as folder:
        pointer = {"run_dir": spec.run_dir, "rank": rank, "code": code}
        Path(folder, f"rank{rank}.json").write_text(json.dumps(pointer))
        ray.train.report({"code": code, "run_dir": spec.run_dir}, ray.train.Checkpoint.from_directory(folder))


def _attend(child: subprocess.Popen[bytes], rank: int, run_dir: Path) -> int:
    """Wait for the child process; when Ray announces that a node will be taken away, have the engine save.

    Broadcasts keep the ranks in step: all leave when rank 0's process has ended, as the engine ends on all ranks
    together. A rank whose process fails leaves at once, and Ray ends the others.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    announced = False
    over = False
    while not over:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_EVERY_S)
        if child.returncode not in (None, *QUIET_CODES):
            break
        over = broadcast_from_rank_zero(child.returncode is not None)
        if not over and not announced and ray.train.get_preemption_info() is not None:
            announced = True
            # A file and no signal: rank 0's engine sees it within a second and has all ranks save at one step.
            if rank == 0:
                (run_dir / "SAVE").touch()
    return child.wait()


def _check_storage_of_ranks(token: Path, rank: int, size: int) -> None:
    """Check that every rank sees the driver's file in the run directory, and rank 0 every rank's.

    Raises:
        LaunchError: One does not.
    """
    from ray.train.collective import barrier

    if not token.exists():
        raise LaunchError(
            f"run_dir {token.parents[1]} is not shared: rank {rank} on {socket.gethostname()} does not see it; use a "
            "path on storage that every Ray node mounts"
        )
    mine = token.with_name(f"{token.name}-{rank}")
    mine.touch()
    barrier()
    absent = [r for r in range(size) if not token.with_name(f"{token.name}-{r}").exists()] if rank == 0 else []
    barrier()
    mine.unlink(missing_ok=True)
    if absent:
        raise LaunchError(f"run_dir {token.parents[1]} is not shared: rank 0 does not see what rank {absent[0]} wrote")
