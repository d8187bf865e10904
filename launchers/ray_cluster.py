"""A Ray cluster: the connection, the resources of its nodes, its autoscaler, and whether its nodes share a folder."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from fine_dist.core.errors import LaunchError
from fine_dist.core.limits import GIB
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.spec import JobSpec

_STATIC_NODE = re.compile(r"node_[0-9a-f]{20,}")
"""Node types of a cluster without an autoscaler: Ray's monitor names each after the id of its node."""


class Demand(TypedDict, total=False):
    """Resources that one task or rank requests, as options of `ray.remote`."""

    num_cpus: float
    num_gpus: float
    memory: int
    """Host memory in bytes."""
    resources: dict[str, float]
    """Amounts of custom resources by name."""


def inside_ray() -> bool:
    """Whether this process is in a Ray job, or RAY_ADDRESS names a cluster."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def address_of(needs: LaunchConfig) -> str:
    """The address in the settings, else RAY_ADDRESS; empty without either."""
    return needs.address or os.environ.get("RAY_ADDRESS") or ""


def connect(address: str | None) -> bool:
    """Connect this process to a Ray cluster.

    Args:
        address: Address of the cluster. None: RAY_ADDRESS, or the cluster of this machine.

    Returns:
        Whether this call made the connection; False if the process was connected already.

    Raises:
        LaunchError: There is no cluster at that address.
    """
    import ray

    if ray.is_initialized():
        return False
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    remedy = (
        "start one with `ray start --head`, or give --launch.address HOST:6379 (connect) or http://HOST:8265 (submit)"
    )
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:  # without this test, ray.init would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise LaunchError(f"no Ray cluster at {where} ({error.strerror or error}); {remedy}") from None
    try:
        ray.init(address or "auto", log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise LaunchError(f"no Ray cluster at {where} ({str(error).splitlines()[0]}); {remedy}") from None
    return True


def nodes() -> list[dict[str, float]]:
    """Resources of every live node, by Ray's names."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def grows() -> bool:
    """Whether an autoscaler may add nodes to this cluster.

    The head of every cluster publishes an autoscaling status. In a cluster without an autoscaler, the node types in it
    are named after the nodes.
    """
    return any(not _STATIC_NODE.fullmatch(name) for name in _node_types())


def _node_types() -> set[str]:
    """Names of the node types in the autoscaler's status, of either version of the autoscaler."""
    from ray.experimental.internal_kv import _internal_kv_get

    status = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")
    # Version 1 of the autoscaler writes its report under this key; version 2 leaves it empty and is queried below.
    report = status.get("autoscaler_report") or {}
    names = {name for key in ("active_nodes", "idle_nodes", "pending_launches") for name in report.get(key) or ()}
    if names:
        return names
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    try:
        cluster = get_cluster_status(ray.get_runtime_context().gcs_address)
    except Exception:  # this Ray has no such autoscaler, or it has not reported yet
        return set()
    return {node.ray_node_type_name for node in [*cluster.active_nodes, *cluster.idle_nodes]}


def one_rank(spec: JobSpec) -> JobSpec:
    """The job of a single process of a job, with its share of the resources."""
    size = spec.processes_per_node
    share = {"nodes": 1, "processes_per_node": 1, "accelerators_per_node": spec.accelerators_per_node / size}
    return spec.model_copy(update={**share, "memory_gb": spec.memory_gb and spec.memory_gb / size})


def demand(spec: JobSpec) -> Demand:
    """Resources that one task of a fan-out requests; all its processes are on one node."""
    options: Demand = {"num_cpus": spec.processes_per_node * spec.cpus_per_process}
    if spec.accelerators_per_node:
        options["num_gpus"] = spec.accelerators_per_node
    if spec.memory_gb:
        options["memory"] = int(spec.memory_gb * GIB)
    if extra := {name: float(amount) for name, amount in spec.extras.get("ray", {}).items()}:
        options["resources"] = extra
    return options


def resources_of(options: Demand) -> dict[str, float]:
    """The requested resources by Ray's names."""
    amounts = {
        "CPU": options.get("num_cpus", 0.0),
        "GPU": options.get("num_gpus", 0.0),
        "memory": options.get("memory", 0),
        **options.get("resources", {}),
    }
    return {name: amount for name, amount in amounts.items() if amount}


def copies(node: Mapping[str, float], options: Demand) -> int:
    """Number of such tasks that a node runs at once."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in resources_of(options).items()), default=1)


def check_storage(run_dir: Path) -> None:
    """Check that every node sees the run directory of this process and can write there.

    Raises:
        LaunchError: A node cannot, or does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    run_dir.mkdir(parents=True, exist_ok=True)
    token = f".storage-{uuid.uuid4().hex}"
    (run_dir / token).touch()
    answers = []
    for node in ray.nodes():
        if node["Alive"]:
            # With hard affinity and no CPU, the task runs on exactly this node, even while all its cores are busy.
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(_sees_file).options(num_cpus=0, max_retries=1, scheduling_strategy=on_node)
            answers.append(task.remote(str(run_dir / token)))
    try:
        seen_by = ray.get(answers, timeout=60)
    except ray.exceptions.RayError as error:
        raise LaunchError(f"{run_dir}: the nodes did not answer whether they see it ({error})") from None
    finally:
        (run_dir / token).unlink()
    unshared = sorted({host for host, seen in seen_by if not seen})
    if unshared:
        raise LaunchError(
            f"run_dir {run_dir} is not shared: {', '.join(unshared)} cannot see a file that this process wrote; use a "
            "path on storage that every Ray node mounts"
        )


def _sees_file(token: str) -> tuple[str, bool]:
    """On a node: its host name, and whether it sees a file and can write into the file's folder."""
    path = Path(token)
    if path.exists():
        # Reading is not enough: some sites mount project folders read-only on compute nodes.
        probe = path.with_name(f"{path.name}-{os.getpid()}")
        probe.touch()
        probe.unlink()
    return socket.gethostname(), path.exists()
