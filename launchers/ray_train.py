"""Ray Train: one job as a `TorchTrainer`, each of whose workers runs one rank of the job in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

from fine_dist.core.errors import EXIT_RESUME, EXIT_TASKS_FAILED, EXIT_USER_ERROR, LaunchError
from fine_dist.core.processes import free_port, rank_environment
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.launcher import Job
from fine_dist.launchers.ray_cluster import (
    demand,
    one_rank,
    resources_of,
)
from fine_dist.launchers.spec import JobSpec
from fine_dist.launchers.worker import PARENT_ENV

QUIET_CODES = (0, EXIT_USER_ERROR, EXIT_TASKS_FAILED, EXIT_RESUME)
"""Exit codes that a restart of the workers would not change. Any other code is a failure of the worker group."""
POLL_S = 2.0
"""Seconds between two polls of the child process and of Ray's announcements of preemption."""


class TrainerThread:
    """A `TorchTrainer` that runs in a thread, so that the launcher can poll it.

    Args:
        job: The job.
        needs: Its `launch` settings.
    """

    def __init__(self, job: Job, needs: LaunchConfig) -> None:
        self._result: tuple[int | None, str | None] | None = None
        # `trainer.fit` blocks until the job ends, while the launcher must poll and handle signals.
        self._thread = threading.Thread(target=self._run, args=(job.spec, str(job.file), needs), daemon=True)
        self._thread.start()

    def check(self, job: Job) -> bool:
        """Whether the job has ended; if so, set its `code` and `reason`."""
        if self._thread.is_alive():
            return False
        job.code, job.reason = self._result or (None, "the trainer ended without a result")
        return True

    def stop(self) -> None:
        """Disconnect from the cluster, which ends the trainer's workers and their processes."""
        import ray

        ray.shutdown()

    def _run(self, spec: JobSpec, file: str, needs: LaunchConfig) -> None:
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
                # Ray requires a process group. Nothing here uses it, and gloo needs no accelerator.
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
            self._result = (int((result.metrics or {}).get("code", 0)), None)
        except Exception as error:
            self._result = (1, _last_line(error))
        finally:
            token.unlink(missing_ok=True)


def _last_line(error: Exception) -> str:
    """The last line of an error's message; of the first failed worker's error, if Ray Train lists those."""
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
    rendezvous = {"address": os.environ.get("MASTER_ADDR", "127.0.0.1"), "port": free_port()} if rank == 0 else None
    # The port must be free on rank 0's node, so rank 0 chooses it there.
    rendezvous = broadcast_from_rank_zero(rendezvous)
    size, local_rank, local_size = context.get_world_size(), context.get_local_rank(), context.get_local_world_size()
    variables = rank_environment(rank, size, local_rank, local_size, **rendezvous)
    env = {**os.environ, **variables, PARENT_ENV: str(os.getpid())}
    env.setdefault("OMP_NUM_THREADS", str(spec.cpus_per_process))
    if spec.code:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [spec.code, env.get("PYTHONPATH")]))
    command = [sys.executable, "-u", "-m", "fine_dist.worker", config["file"]]
    # A child process, because the engine needs the main thread and signal handlers, which Ray uses in its worker.
    child = subprocess.Popen(command, env=env, cwd=spec.code or spec.cwd, stdin=subprocess.DEVNULL)
    try:
        code = _supervise(child, rank, Path(spec.run_dir))
    finally:
        # When another rank has failed, Ray ends this function by an exception.
        child.kill()
        child.wait()
    # Ray counts a failure and restarts the group only after an exception.
    if code not in QUIET_CODES:
        raise RuntimeError(f"rank {rank} on {socket.gethostname()} ended with code {code}")
    with tempfile.TemporaryDirectory() as folder:
        pointer = {"run_dir": spec.run_dir, "rank": rank, "code": code}
        Path(folder, f"rank{rank}.json").write_text(json.dumps(pointer))
        ray.train.report({"code": code, "run_dir": spec.run_dir}, ray.train.Checkpoint.from_directory(folder))


def _supervise(child: subprocess.Popen[bytes], rank: int, run_dir: Path) -> int:
    """Wait for the child process; when Ray announces the preemption of a node, make the engine save.

    Broadcasts keep the ranks in step: all return when rank 0's process has ended, because the engine ends on all ranks
    together. A rank whose process fails returns at once, and Ray ends the others.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    announced = False
    ended = False
    while not ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL_S)
        if child.returncode not in (None, *QUIET_CODES):
            break
        ended = broadcast_from_rank_zero(child.returncode is not None)
        if not ended and not announced and ray.train.get_preemption_info() is not None:
            announced = True
            # A file instead of a signal: rank 0's engine reads it within a second and makes all ranks save at one step.
            if rank == 0:
                (run_dir / "SAVE").touch()
    return child.wait()


def _check_storage_of_ranks(token: Path, rank: int, size: int) -> None:
    """Check that every rank sees the driver's file in the run directory, and rank 0 a file of every rank.

    Raises:
        LaunchError: A rank does not.
    """
    from ray.train.collective import barrier

    if not token.exists():
        raise LaunchError(
            f"run_dir {token.parents[1]} is not shared: rank {rank} on {socket.gethostname()} does not see it; use a "
            "path on storage that every Ray node mounts"
        )
    own = token.with_name(f"{token.name}-{rank}")
    own.touch()
    barrier()
    absent = [r for r in range(size) if not token.with_name(f"{token.name}-{r}").exists()] if rank == 0 else []
    barrier()
    own.unlink(missing_ok=True)
    if absent:
        raise LaunchError(f"run_dir {token.parents[1]} is not shared: rank 0 does not see what rank {absent[0]} wrote")
