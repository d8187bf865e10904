"""The Ray cluster: connecting to it, what its nodes hold, whether they share a directory."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fine_dist.core.errors import LaunchError
from launchers.spec import JobSpec


def inside_ray() -> bool:
    """Whether this process is in a Ray job, or is told by RAY_ADDRESS where Ray is."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def connect(address: str | None) -> bool:
    """Connect this process to a Ray cluster; whether it was not connected before."""
    import ray

    if ray.is_initialized():
        return False
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    remedy = (
        "start one with `ray start --head`, or give --launch.address HOST:6379 (connect) or http://HOST:8265 (submit)"
    )
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:  # ray.init would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise LaunchError(f"no Ray cluster at {where} ({error.strerror or error}); {remedy}") from None
    try:
        ray.init(address or "auto", log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise LaunchError(f"no Ray cluster at {where} ({str(error).splitlines()[0]}); {remedy}") from None
    return True


def nodes() -> list[dict[str, float]]:
    """Resources of every node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def grows() -> bool:
    """Whether an autoscaler looks after this cluster."""
    from ray.experimental.internal_kv import _internal_kv_get

    return bool(_internal_kv_get("__autoscaling_status")) or "RAY_CLUSTER_NAME" in os.environ


def one_rank(spec: JobSpec) -> JobSpec:
    """The share of one process of a job."""
    size = spec.processes_per_node
    share = {"nodes": 1, "processes_per_node": 1, "accelerators_per_node": spec.accelerators_per_node / size}
    return spec.model_copy(update={**share, "memory_gb": spec.memory_gb and spec.memory_gb / size})


def demand(spec: JobSpec) -> dict[str, Any]:
    """What one task of a fan-out asks of Ray; its processes share a node."""
    options: dict[str, Any] = {"num_cpus": spec.processes_per_node * spec.cpus_per_process}
    if spec.accelerators_per_node:
        options["num_gpus"] = spec.accelerators_per_node
    if spec.memory_gb:
        options["memory"] = int(spec.memory_gb * 2**30)
    extra = {name: float(amount) for name, amount in spec.extras.get("ray", {}).items()}
    return {**options, "resources": extra} if extra else options


def copies(node: Mapping[str, float], options: Mapping[str, Any]) -> int:
    """How many tasks with such a demand a node holds."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    wanted = {names[key]: value for key, value in options.items() if key in names} | dict(options.get("resources", {}))
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in wanted.items() if amount), default=1)


def check_storage(run_dir: Path) -> None:
    """`LaunchError` unless every node sees what this process writes into the run directory, and writes there too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    run_dir.mkdir(parents=True, exist_ok=True)
    token = f".storage-{uuid.uuid4().hex}"
    (run_dir / token).touch()
    there = []
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = ray.remote(_sees).options(num_cpus=0, max_retries=1, scheduling_strategy=place)
            there.append(look.remote(str(run_dir / token)))
    try:
        said = ray.get(there, timeout=60)
    except ray.exceptions.RayError as error:
        raise LaunchError(f"{run_dir}: the nodes could not be asked whether they see it ({error})") from None
    finally:
        (run_dir / token).unlink()
    blind = sorted({host for host, seen in said if not seen})
    if blind:
        raise LaunchError(
            f"run_dir {run_dir} is not shared: {', '.join(blind)} cannot see what this process wrote there; use a path "
            "on storage that every Ray node mounts"
        )


def _sees(token: str) -> tuple[str, bool]:
    path = Path(token)
    if path.exists():
        mine = path.with_name(f"{path.name}-{os.getpid()}")
        mine.touch()
        mine.unlink()
    return socket.gethostname(), path.exists()
