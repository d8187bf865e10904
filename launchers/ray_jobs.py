"""From a laptop to a Ray cluster over HTTP: the command itself becomes one Ray job, with a copy of the code."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fine_dist.core.config import Config, dump_yaml, expand_path
from fine_dist.core.errors import LaunchError
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.code_snapshot import stage_code
from fine_dist.launchers.launch_target import CommandTarget, register
from fine_dist.launchers.preflight import check_upload, refuse
from fine_dist.launchers.prepare import launch_of
from fine_dist.launchers.ray_cluster import address_of, inside_ray

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger(__name__)

PATH_KEYS = (
    "ancestor", "baselines", "classifier", "extra", "held_out", "images", "learngene", "models", "out", "parent",
    "parents", "reference", "shards", "source", "vae",
)  # fmt: skip
"""Settings that hold paths. Their values count as paths even without a slash, if they exist."""
AGENT_WAIT_S = 90.0
"""Seconds for which a submission is repeated while the cluster's job agent does not answer."""


@register
class RayJobs(CommandTarget):
    """The Ray cluster at an HTTP address (`launch.address` or RAY_ADDRESS). The whole command becomes one Ray job."""

    name = "ray"
    detached = True

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        return address_of(needs).startswith("http")

    @classmethod
    def affinity(cls, needs: LaunchConfig) -> int:
        return 30 if inside_ray() else 0

    def run(self, module: str, config: Config) -> int:
        return submit_command(module, config, address_of(self.needs))


def submit_command(module: str, config: Config, address: str) -> int:
    """Submit `python -m MODULE --launcher ray` with this config to Ray Jobs.

    The code and the config are uploaded as the job's working directory. Relative paths become absolute ones first,
    because the job runs in a temporary folder. Data and run_dir must be on storage that the cluster mounts under the
    same path.

    Args:
        module: Importable name of the stage's module.
        config: Its config.
        address: HTTP address of the cluster's dashboard.

    Returns:
        The exit code: 0 if the job succeeded, else 1. Without `launch.wait`, 0 when the job has been submitted.

    Raises:
        LaunchError: run_dir is relative, the code is too large, or the cluster does not take the job.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    needs = launch_of(config)
    run_dir = expand_path(str(getattr(config, "run_dir", "")))
    if not os.path.isabs(run_dir):
        raise LaunchError(
            f"run_dir {run_dir!r}: a Ray job runs in a folder that Ray deletes; give an absolute path on shared "
            f"storage, such as {os.path.abspath(run_dir)} if the cluster mounts it"
        )
    # Inside the job RAY_ADDRESS names the cluster; the HTTP address is of no use there.
    inner = config.model_copy(update={"launch": needs.model_copy(update={"address": None, "snapshot": True})})
    inner = with_absolute_paths(inner)
    refuse(needs, [check_upload(module)])
    with tempfile.TemporaryDirectory() as folder:
        stage_code(Path(folder), module)
        (Path(folder) / "job.yaml").write_text(dump_yaml(inner), encoding="utf-8")
        try:
            client = JobSubmissionClient(address)
            env = {"working_dir": folder, "env_vars": dict(needs.env)}
            job = _submit(client, f"python -m {module} --config job.yaml --launcher ray", env)
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise LaunchError(f"Ray Jobs at {address}: {str(error).strip().splitlines()[0]}") from None
    print(f"submitted {module} as Ray job {job}; follow: ray job logs --follow --address {address} {job}", flush=True)
    if not needs.wait:
        return 0
    # Ray returns the complete log at each call, so the part that has been printed is skipped.
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


def with_absolute_paths(config: Config) -> Config:
    """The config with every relative path made absolute from the current directory.

    A string counts as a path if it begins with `./` or `../`, if its first folder exists (the run directory `runs/a`
    itself need not), or if it is the value of a key in `PATH_KEYS` and exists. Other strings, such as names on a hub,
    are not changed. Neither are `~` and $VARIABLES, which the cluster expands.
    """
    changes: dict[str, object] = {}
    for key in type(config).model_fields:
        value = getattr(config, key)
        changed = _absolute(key, value)
        if changed is not value:
            log.info("%s: %s is %s for the Ray job", key, value, changed)
            changes[key] = changed
    return config.model_copy(update=changes) if changes else config


def _absolute(key: str, value: object) -> object:
    """`value` with absolute paths; the same object if nothing in it changed."""
    if isinstance(value, Config):
        return with_absolute_paths(value)
    if isinstance(value, (tuple, list)):
        parts = [_absolute(key, part) for part in value]
        return type(value)(parts) if any(new is not old for new, old in zip(parts, value)) else value
    if isinstance(value, dict):
        entries = {name: _absolute(key, part) for name, part in value.items()}
        return entries if any(entries[name] is not value[name] for name in entries) else value
    return os.path.abspath(value) if isinstance(value, str) and _is_relative_path(key, value) else value


def _is_relative_path(key: str, text: str) -> bool:
    if not text or "://" in text or text.startswith(("/", "~", "$", "pipe:")) or "\0" in text or len(text) > 4096:
        return False
    if text.startswith(("./", "../")):
        return True
    first, slash, _ = text.partition("/")
    return os.path.isdir(first) if slash else key in PATH_KEYS and os.path.exists(text)


def _submit(client: JobSubmissionClient, entrypoint: str, runtime_env: Mapping[str, object]) -> str:
    """Submit a job; returns its id. Repeated for a while if the head's agent has not started or is too busy."""
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=dict(runtime_env)))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(2)
