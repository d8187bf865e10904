"""The world of this process: its device, the process group that it joins, and collectives.

`world()` reads the environment once a process and, when there are several processes, joins them into a process group:
NCCL for tensors on a GPU, gloo for tensors in host memory. In a world of one, the collectives below do nothing at all.
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
from fine_dist.core.processes import rank_words, seconds_in
from fine_dist.engine.world import World, read_environment

COLLECTIVE_TIMEOUT_S = 1800
"""Seconds that a collective may wait (rank 0 evaluates meanwhile); `engine.heartbeat` notices a dead rank much
sooner."""
GPU_REQUIRED = "FINE_DIST_GPU_REQUIRED"
"""Environment variable that a launcher sets to 1 for a job that asked for GPUs: its processes never run on the CPU."""

_current: World | None = None


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process.

    GPUs are counted by torch, which alone knows whether it can use them. A process that sees exactly one GPU takes it
    whatever its local rank is: SLURM's `--gpus-per-task` shows each process its own.

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
    # NCCL and pinned memory use the current device, whatever device
    # a tensor is on; without this all ranks open contexts on GPU 0.
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def why_no_gpu() -> str:
    """Why torch has no GPU to use here, in its own words where it has some."""
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
    """This process's world. The first call meets the other ranks; later calls return the same answer.

    Raises:
        LaunchError: The ranks cannot meet, or a job that asked for GPUs has ranks without one, or some ranks have a GPU
            and others have none (`ReportedElsewhere` on all ranks but 0).
    """
    global _current
    if _current is None:
        found, problem = read_environment(), ""
        try:
            # A rank that raised here would leave the others waiting for it until their time limit.
            found = replace(found, device=pick_device(device, found.local_rank))
        except ConfigError as error:
            if found.world_size == 1:
                raise
            problem = str(error)  # the others wait for this rank, so it meets them and says what is wrong
        about = _about_device(found, problem)
        if found.world_size > 1:
            _join(found, about)
        else:
            _refuse_wrong_devices([about], found)
        _current = found
    # A process that has joined for one command may run another on the CPU, such as a test or a notebook.
    elif device != "auto" and _current.device is not None and _current.device.type != device:
        _current = replace(_current, device=pick_device(device, _current.local_rank))
    return _current


def alone(device: str = "auto") -> World:
    """A world of this process only, whatever the environment says: for a task of a fan-out."""
    found = World(device=pick_device(device))
    if device != "cpu":
        _refuse_wrong_devices([_about_device(found)], found)
    return found


def leave() -> None:
    """Destroy the process group; `world()` may join another."""
    global _current

    _current = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def join_alone(device: torch.device) -> None:
    """A process group of one, for libraries that need one (DeepSpeed, FSDP2)."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    # Both: JSON and gathered weights travel between host memories, and gradients between GPUs.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _join(found: World, about: dict[str, str]) -> None:
    """Meet the other ranks, compare devices while only a key-value store connects them, and make the process group.

    The comparison comes first because a group whose ranks disagree about their devices does not fail: it waits for its
    time limit, half an hour.
    """
    assert found.master is not None
    host, _, port = found.master.rpartition(":")
    # Libraries that read the environment themselves (DeepSpeed, NCCL, diffusers) find the same values.
    variables = rank_words(found.rank, found.world_size, found.local_rank, found.local_size, host, port)
    for key, value in variables.items():
        # Values that a launcher or a user has set stay as they are.
        os.environ.setdefault(key, value)
    if dist.is_initialized():  # by Ray
        _refuse_wrong_devices(gather_objects(about, found), found)
        return
    timeout = timedelta(seconds=seconds_in(os.environ, "FINE_DIST_COLLECTIVE_TIMEOUT_S", COLLECTIVE_TIMEOUT_S))
    try:
        # The store of the group that is made below is used before the group exists; prefixes keep their keys apart.
        store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
        devices = dist.PrefixStore("devices", store)
        devices.set(str(found.rank), json.dumps(about))
        abouts = [json.loads(devices.get(str(other))) for other in range(size)] if found.is_main else []
        if found.is_main:  # one rank asks for all: 512 ranks that ask each other would be 262,144 requests
            devices.set("all", json.dumps(abouts))
        abouts = json.loads(devices.get("all"))
        # Counted by every rank; rank 0 reads the count before it ends (see `_wait_for_readers`).
        devices.add("read", 1)
        try:
            _refuse_wrong_devices(abouts, found)
        except LaunchError:
            _wait_for_readers(devices, size)
            raise
        assert found.device is not None
        group = dist.PrefixStore("group", store)
        dist.init_process_group(_backend(found.device), store=group, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {found.rank} of {found.world_size} on {socket.gethostname()} could not meet the others at "
            f"{found.master}: {str(error).splitlines()[0]}; check that every rank started and that the port is open"
        ) from error


def _wait_for_readers(devices: dist.PrefixStore, world_size: int, limit_s: float = 10.0) -> None:
    """Wait until every rank has read the list of devices, at most `limit_s`.

    Rank 0 serves the store. If it ended at once, slower ranks would report a lost connection instead of the reason.
    """
    end = time.monotonic() + limit_s
    while devices.add("read", 0) < world_size and time.monotonic() < end:
        time.sleep(0.05)


def _about_device(found: World, problem: str = "") -> dict[str, str]:
    """What the other ranks have to know of this one's device (JSON values)."""
    kind = found.device.type if found.device is not None else "none"
    about = {"host": socket.gethostname(), "kind": kind, "why": problem, "id": ""}
    if kind == "cuda":
        about["id"] = str(getattr(torch.cuda.get_device_properties(found.device), "uuid", ""))
    elif kind == "cpu" and os.environ.get(GPU_REQUIRED) == "1":
        about["why"] = why_no_gpu()
    return about


def _refuse_wrong_devices(abouts: list[dict[str, str]], found: World) -> None:
    """Raise when a rank lacks the GPU that the job asked for or that others have, or when two ranks share one."""
    without = [rank for rank, about in enumerate(abouts) if about["kind"] == "cpu"]
    asked = os.environ.get(GPU_REQUIRED) == "1"
    what = ""
    if without and (asked or len(without) < len(abouts)):
        first = abouts[without[0]]
        ranks = ", ".join(f"{rank} ({abouts[rank]['host']})" for rank in without[:8])
        more = f" and {len(without) - 8} more" if len(without) > 8 else ""
        why = f": {first['why']}" if first["why"] else ""
        wanted = (
            "the job asked for GPUs" if asked else f"{len(abouts) - len(without)} of {len(abouts)} ranks have a GPU"
        )
        what = (
            f"{wanted}, and rank {ranks}{more} runs on the CPU{why}. Check the driver and CUDA_VISIBLE_DEVICES there, "
            "or set engine.device to cpu and launch.gpus to 0"
        )
    # A GPU is known by its host and UUID. Indices do not tell:
    # with one visible device per task every rank sees number 0.
    seen: dict[tuple[str, str], int] = {}
    for rank, about in enumerate(abouts):
        if about["kind"] == "none" and not what:
            what = f"rank {rank}: {about['why']}"
        if not about["id"]:
            continue
        other = seen.setdefault((about["host"], about["id"]), rank)
        if other != rank and not what:
            what = (
                f"ranks {other} and {rank} share one GPU of {about['host']}, and NCCL needs one a rank; lower "
                "launch.processes, or check CUDA_VISIBLE_DEVICES"
            )
    if what:
        # All ranks know the reason, and one of them says it: 512 copies of one message would bury it.
        raise LaunchError(what) if found.is_main else ReportedElsewhere(what)


# --- collectives: in a world of one they do nothing -----------------------------------------------------------------


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.world_size > 1:
        # A sum in host memory, over gloo: it makes the host wait for the other hosts and leaves the GPUs' queues alone.
        all_reduce_sum(torch.zeros(1), world)


def all_reduce_sum(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Sum over ranks, in place, on the tensor's own device (gloo or NCCL)."""
    if world.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Maximum over ranks, in place."""
    if world.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: torch.Tensor, world: World, source: int = 0, group: Any = None) -> torch.Tensor:
    """Take rank `source`'s values, in place, on the tensor's own device; among the ranks of `group`, or all."""
    if world.world_size > 1:
        dist.broadcast(tensor, src=source, group=group)
    return tensor


@contextlib.contextmanager
def node_group(world: World) -> Iterator[tuple[int, Any]]:
    """A context with the first rank of this rank's node and a process group of the node's ranks.

    The group is None where all ranks are on one node. All ranks enter and leave at the same point. On a GPU a group
    holds some hundred MiB of NCCL's buffers, so it goes when the context ends.
    """
    firsts = gather_objects(world.rank - world.local_rank, world)
    first = firsts[world.rank]
    mine = [rank for rank, other in enumerate(firsts) if other == first]
    if first not in mine:
        raise LaunchError(
            f"rank {world.rank} has LOCAL_RANK {world.local_rank}, so rank {first} should be the first on its node, "
            f"and that one has LOCAL_RANK {first - firsts[first]}; start the processes with torchrun, srun or Ray"
        )
    if len(mine) == world.world_size:
        yield first, None
        return
    group = dist.new_group(mine, use_local_synchronization=True)
    try:
        yield first, group
    finally:
        dist.destroy_process_group(group)


def broadcast_object(value: Any, world: World, source: int = 0) -> Any:
    """A value (JSON's types) of rank `source`, on every rank."""
    return gather_objects(value, world)[source]


def gather_objects(value: Any, world: World) -> list[Any]:
    """A value (JSON's types) of every rank, in rank order, on every rank. Nothing is pickled."""
    if world.world_size == 1:
        return [value]

    # JSON as bytes, because torch's `all_gather_object` pickles, and unpickling runs code that the sender chose.
    message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    # `all_gather` needs equal sizes, so the lengths are exchanged first and the messages padded.
    sizes = torch.zeros(world.world_size, dtype=torch.int64)
    sizes[world.rank] = len(message)
    all_reduce_sum(sizes, world)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(message)] = message
    parts = [torch.empty_like(padded) for _ in range(world.world_size)]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes.tolist())]
