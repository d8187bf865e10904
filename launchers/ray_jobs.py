"""From a laptop to a Ray cluster over HTTP: the command itself becomes one Ray job, with the code it was typed with."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fine_dist.core.config import Config, dump_yaml
from fine_dist.core.errors import LaunchError
from fine_dist.core.settings import LaunchConfig
from launchers.base import CommandTarget
from launchers.code_snapshot import stage_code
from launchers.preflight import refuse, upload
from launchers.prepare import launch_of
from launchers.ray_cluster import inside_ray

AGENT_WAIT_S = 90.0
"""Seconds in which a busy cluster's head may become able to take a job."""


class RayJobs(CommandTarget):
    """The Ray cluster behind an HTTP address (`launch.address` or RAY_ADDRESS): it gets the command, not its jobs."""

    name = "ray"
    detached = True

    @classmethod
    def is_the_one(cls, needs: LaunchConfig) -> bool:
        return inside_ray()

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        return _address(needs).startswith("http")

    def run(self, module: str, config: Config) -> int:
        return submit_command(module, config, _address(self.needs))


def _address(needs: LaunchConfig) -> str:
    return needs.address or os.environ.get("RAY_ADDRESS") or ""


def submit_command(module: str, config: Config, address: str) -> int:
    """Submit `python -m MODULE --launcher ray` with this config to Ray Jobs at `address`; its exit code, 0 or 1.

    Uploaded are the code and the config; data and run_dir must be paths that the cluster knows. Raises `LaunchError`.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    needs = launch_of(config)
    if not os.path.isabs(os.path.expanduser(str(getattr(config, "run_dir", "")))):
        raise LaunchError(
            "run_dir: a Ray job runs in a folder that Ray deletes; give an absolute path on shared storage"
        )
    # Inside the job the cluster is at hand: what was the address here is not one there.
    inner = config.model_copy(update={"launch": needs.model_copy(update={"address": None, "snapshot": True})})
    refuse(needs, [upload(module)])
    with tempfile.TemporaryDirectory() as folder:
        stage_code(Path(folder), module)
        (Path(folder) / "job.yaml").write_text(dump_yaml(inner))
        try:
            client = JobSubmissionClient(address)
            env = {"working_dir": folder, "env_vars": dict(needs.env)}
            job = _patiently(client, f"python -m {module} --config job.yaml --launcher ray", env)
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise LaunchError(f"Ray Jobs at {address}: {str(error).strip().splitlines()[0]}") from None
    print(f"submitted {module} as Ray job {job}; follow: ray job logs --follow --address {address} {job}", flush=True)
    if not needs.wait:
        return 0
    shown = 0
    while True:
        status = client.get_job_status(job)
        text = client.get_job_logs(job)
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
        if status.is_terminal():
            return 0 if status == JobStatus.SUCCEEDED else 1
        time.sleep(1)


def _patiently(client: Any, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Submit a job. A head whose agent is not up yet, or too busy to answer, is asked again for a while."""
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(2)
