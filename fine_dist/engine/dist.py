"""The device of this process, its process group, and collectives.

`world()` reads the environment once per process and, if there are several processes, creates a process group: NCCL for
tensors on a GPU, gloo for tensors in host memory. With a world size of 1 the collectives below do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fine_dist.core.errors import ConfigError, LaunchError, ReportedElsewhere
from fine_dist.core.processes import rank_environment, seconds_from_env
from fine_dist.engine.world import World, read_environment

COLLECTIVE_TIMEOUT_S = 1800
"""Time limit of a collective in seconds. Ranks wait this long while rank 0 evaluates; `engine.heartbeat` detects a dead
rank much sooner."""
GPU_REQUIRED = "FINE_DIST_GPU_REQUIRED"
"""Environment variable that a launcher sets to 1 for a job that requested GPUs, whose processes must not run on a
CPU."""

_current: World | None = None


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process.

    GPUs are counted by torch, because only torch knows whether it can use them. A process that sees exactly one GPU
    uses it whatever its local rank is, because SLURM's `--gpus-per-task` shows each process only its own.

    Args:
        name: `auto` (a GPU when there is one), `cpu` or `cuda`.
        local_rank: Number of this process on its node.

    Raises:
        ConfigError: `cuda` was asked for and no GPU is usable, or the node has fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        raise ConfigError(
            f"engine.device: cuda was asked for and no GPU is usable on {socket.gethostname()} ({why_no_gpu()}); "
            "legal here: cpu, auto"
        )
    if name == "cpu" or not count:
        return torch.device("cpu")
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise ConfigError(
            f"this process is number {local_rank} on {socket.gethostname()}, which shows it {count} GPUs; start at "
            f"most {count} processes a node, or check CUDA_VISIBLE_DEVICES"
        )
    # NCCL and pinned memory use the current device whatever device a
    # tensor is on; without this call all ranks open contexts on GPU 0.
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def why_no_gpu() -> str:
    """Why torch cannot use a GPU here, with torch's own error message if it has one."""
    if getattr(torch, "xpu", None) is not None and torch.xpu.is_available():
        return "torch sees an Intel GPU (xpu); GPUs of NVIDIA and AMD are supported"
    if torch.backends.mps.is_available():
        return "torch sees an Apple GPU (mps); GPUs of NVIDIA and AMD are supported"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # an old driver, no driver, or no device
        return f"torch {torch.__version__} for {built}{shown}: {str(error).splitlines()[0]}"
    return f"torch {torch.__version__} for {built}{shown}: no device"


def world(device: str = "auto") -> World:
    """The world of this process. The first call creates the process group; later calls return the same world.

    Raises:
        LaunchError: The ranks cannot connect, or a job that requested GPUs has ranks without one, or only some ranks
            have a GPU (`ReportedElsewhere` on all ranks but 0).
    """
    global _current
    if _current is None:
        joining, problem = read_environment(), ""
        try:
            # If this rank raised here, the others would wait for it until their time limit.
            joining = replace(joining, device=pick_device(device, joining.local_rank))
        except ConfigError as error:
            if joining.world_size == 1:
                raise
            problem = str(error)  # sent to the other ranks in `_join`
        facts = _about_device(joining, problem)
        if joining.world_size > 1:
            _join(joining, facts)
        else:
            _refuse_wrong_devices([facts], joining)
        _current = joining
    # A test or a notebook may run a command on a GPU and then another one on the CPU.
    elif device != "auto" and _current.device is not None and _current.device.type != device:
        _current = replace(_current, device=pick_device(device, _current.local_rank))
    return _current


def single_process(device: str = "auto") -> World:
    """A world of size 1 that ignores the environment, for a task of a fan-out."""
    single = World(device=pick_device(device))
    if device != "cpu":
        _refuse_wrong_devices([_about_device(single)], single)
    return single


def leave() -> None:
    """Destroy the process group, so that `world()` can create another one."""
    global _current

    _current = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def init_single_process_group(device: torch.device) -> None:
    """Create a process group of size 1 for libraries that need one (DeepSpeed, FSDP2)."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    # Both backends: JSON and gathered weights are sent from host memory, gradients from GPUs.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _join(joining: World, facts: dict[str, str]) -> None:
    """Connect to the other ranks, compare devices through the key-value store, and create the process group.

    The comparison comes first, because a process group whose ranks use different devices does not fail but hangs until
    its time limit of half an hour.
    """
    assert joining.master is not None
    host, _, port = joining.master.rpartition(":")
    # Libraries that read the environment themselves (DeepSpeed, NCCL, diffusers) find the same values.
    variables = rank_environment(joining.rank, joining.world_size, joining.local_rank, joining.local_size, host, port)
    for key, value in variables.items():
        # Values that a launcher or a user has set are not changed.
        os.environ.setdefault(key, value)
    if dist.is_initialized():  # Ray has created the process group
        _refuse_wrong_devices(gather_objects(facts, joining), joining)
        return
    timeout = timedelta(seconds=seconds_from_env(os.environ, "FINE_DIST_COLLECTIVE_TIMEOUT_S", COLLECTIVE_TIMEOUT_S))
    try:
        # The store of the later process group is used here already; prefixes separate the keys.
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        devices = dist.PrefixStore("devices", store)
        devices.set(str(joining.rank), json.dumps(facts))
        all_facts = [json.loads(devices.get(str(other))) for other in range(size)] if joining.is_main else []
        if joining.is_main:  # rank 0 collects: with all 512 ranks reading each other there would be 262,144 requests
            devices.set("all", json.dumps(all_facts))
        all_facts = json.loads(devices.get("all"))
        # Incremented by every rank and read by rank 0 before it ends (`_wait_for_readers`).
        devices.add("read", 1)
        try:
            _refuse_wrong_devices(all_facts, joining)
        except LaunchError:
            _wait_for_readers(devices, size)
            raise
        assert joining.device is not None
        group = dist.PrefixStore("group", store)
        dist.init_process_group(_backend(joining.device), store=group, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {joining.rank} of {joining.world_size} on {socket.gethostname()} could not meet the others at "
            f"{joining.master}: {str(error).splitlines()[0]}; check that every rank started and that the port is open"
        ) from error


def _wait_for_readers(devices: dist.PrefixStore, world_size: int, limit_s: float = 10.0) -> None:
    """Wait until every rank has read the list of devices, at most `limit_s`.

    Rank 0 hosts the store. If it ended at once, slower ranks would report a lost connection instead of the reason.
    """
    end = time.monotonic() + limit_s
    while devices.add("read", 0) < world_size and time.monotonic() < end:
        time.sleep(0.05)


def _about_device(joining: World, problem: str = "") -> dict[str, str]:
    """The facts about this rank's device that other ranks need (JSON values): host, kind, GPU id, and a problem."""
    kind = joining.device.type if joining.device is not None else "none"
    facts = {"host": socket.gethostname(), "kind": kind, "why": problem, "id": ""}
    if kind == "cuda":
        facts["id"] = str(getattr(torch.cuda.get_device_properties(joining.device), "uuid", ""))
    elif kind == "cpu" and os.environ.get(GPU_REQUIRED) == "1":
        facts["why"] = why_no_gpu()
    return facts


def _refuse_wrong_devices(all_facts: list[dict[str, str]], joining: World) -> None:
    """Raise if a rank has no GPU although the job requested GPUs or other ranks have one, or if two ranks share one."""
    without = [rank for rank, facts in enumerate(all_facts) if facts["kind"] == "cpu"]
    gpu_required = os.environ.get(GPU_REQUIRED) == "1"
    what = ""
    if without and (gpu_required or len(without) < len(all_facts)):
        first = all_facts[without[0]]
        ranks = ", ".join(f"{rank} ({all_facts[rank]['host']})" for rank in without[:8])
        more = f" and {len(without) - 8} more" if len(without) > 8 else ""
        why = f": {first['why']}" if first["why"] else ""
        wanted = (
            "the job asked for GPUs"
            if gpu_required
            else f"{len(all_facts) - len(without)} of {len(all_facts)} ranks have a GPU"
        )
        what = (
            f"{wanted}, and rank {ranks}{more} runs on the CPU{why}. Check the driver and CUDA_VISIBLE_DEVICES there, "
            "or set engine.device to cpu and launch.gpus to 0"
        )
    # A GPU is identified by its host and UUID and not by its index,
    # because with one visible device per task every rank has index 0.
    rank_of_gpu: dict[tuple[str, str], int] = {}
    for rank, facts in enumerate(all_facts):
        if facts["kind"] == "none" and not what:
            what = f"rank {rank}: {facts['why']}"
        if not facts["id"]:
            continue
        first_rank = rank_of_gpu.setdefault((facts["host"], facts["id"]), rank)
        if first_rank != rank and not what:
            what = (
                f"ranks {first_rank} and {rank} share one GPU of {facts['host']}, and NCCL needs one a rank; lower "
                "launch.processes, or check CUDA_VISIBLE_DEVICES"
            )
    if what:
        # All ranks know the reason, and rank 0 reports it once instead of 512 times.
        raise LaunchError(what) if joining.is_main else ReportedElsewhere(what)


# --- collectives (no-ops with a world size of 1) --------------------------------------------------------------------


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.world_size > 1:
        # A sum in host memory, over gloo, which synchronizes the hosts and does not touch the GPUs' queues.
        all_reduce_sum(torch.zeros(1), world)


def all_reduce_sum(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Sum over ranks, in place, on the tensor's device (gloo or NCCL)."""
    if world.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Maximum over ranks, in place."""
    if world.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: torch.Tensor, world: World, source: int = 0, group: Any = None) -> torch.Tensor:
    """Broadcast the values of rank `source`, in place, on the tensor's device, to the ranks of `group` or to all."""
    if world.world_size > 1:
        dist.broadcast(tensor, src=source, group=group)
    return tensor


@contextlib.contextmanager
def node_group(world: World) -> Iterator[tuple[int, Any]]:
    """A context with the first rank of this rank's node and a process group of the node's ranks.

    The group is None if all ranks are on one node. All ranks enter and leave at the same point. The group is destroyed
    at the end, because on a GPU it holds some hundred MiB of NCCL buffers.
    """
    firsts = gather_objects(world.rank - world.local_rank, world)
    first = firsts[world.rank]
    ranks = [rank for rank, other in enumerate(firsts) if other == first]
    if first not in ranks:
        raise LaunchError(
            f"rank {world.rank} has LOCAL_RANK {world.local_rank}, so rank {first} should be the first on its node, "
            f"and that one has LOCAL_RANK {first - firsts[first]}; start the processes with torchrun, srun or Ray"
        )
    if len(ranks) == world.world_size:
        yield first, None
        return
    group = dist.new_group(ranks, use_local_synchronization=True)
    try:
        yield first, group
    finally:
        dist.destroy_process_group(group)


def broadcast_object(value: Any, world: World, source: int = 0) -> Any:
    """Broadcast a value (JSON types) of rank `source` to every rank."""
    return gather_objects(value, world)[source]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Gather a value (JSON types) of every rank, in rank order, on every rank. Nothing is pickled."""
    if world.world_size == 1:
        return [value]

    # JSON instead of torch's `all_gather_object`, which pickles: unpickling can run code of the sender.
    message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    # `all_gather` needs equal sizes, so lengths are exchanged first and messages are padded.
    sizes = torch.zeros(world.world_size, dtype=torch.int64)
    sizes[world.rank] = len(message)
    all_reduce_sum(sizes, world)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(message)] = message
    parts = [torch.empty_like(padded) for _ in range(world.world_size)]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes.tolist())]
