"""Which process this is, among which: the words of torchrun, DeepSpeed's launcher, SLURM and Ray, read in one place.

`world()` answers once a process and, when there are several, joins them into a process group (NCCL for tensors on a
GPU, gloo for those in host memory). The reductions below do nothing, exactly, in a world of one.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fine_dist.core.errors import ConfigError, LaunchError
from fine_dist.core.processes import derived_port, number_in, rank_words, seconds_in

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT_S = 1800
"""A collective may wait this long (rank 0 evaluates meanwhile); `engine.watch` notices a dead rank much sooner."""


@dataclass(frozen=True)
class World:
    """This process among the others of one run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device | None = None
    master: str | None = None
    """host:port where the ranks meet; none when they have met already (Ray) or there is one."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs, metrics and artifacts."""
        return self.rank == 0


_current: World | None = None


def read_environment(env: Mapping[str, str] = os.environ) -> World:
    """The world as the launcher describes it; device is not chosen yet. `LaunchError` when the words contradict.

    RANK, WORLD_SIZE, LOCAL_RANK (torchrun, the deepspeed launcher, Ray Train) come first. SLURM's are read inside an
    `srun` step only: a batch script also has SLURM_PROCID=0, but it is one process whatever SLURM_NTASKS says.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = number_in(env, "RANK"), number_in(env, "WORLD_SIZE", least=1)
        local = number_in(env, "LOCAL_RANK", rank)
        local_size = number_in(env, "LOCAL_WORLD_SIZE", number_in(env, "LOCAL_SIZE", size, least=1), least=1)
        master = f"{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        rank, size = number_in(env, "SLURM_PROCID"), number_in(env, "SLURM_STEP_NUM_TASKS", least=1)
        local = number_in(env, "SLURM_LOCALID", 0)
        per_node = re.split(r"[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))[0]
        local_size = number_in({"SLURM_STEP_TASKS_PER_NODE": per_node}, "SLURM_STEP_TASKS_PER_NODE", size, least=1)
        host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
        port = env.get("MASTER_PORT") or derived_port(
            number_in(env, "SLURM_JOB_ID", 0), number_in(env, "SLURM_STEP_ID", 0)
        )
        master = f"{host}:{port}"
    else:
        return World()
    if not 0 <= rank < size:
        raise LaunchError(f"RANK {rank} is outside WORLD_SIZE {size}; start the processes with torchrun, srun or Ray")
    return World(rank, size, local, local_size, master=master)


def first_host(nodelist: str) -> str:
    """The first name of SLURM's compressed list: `gpu[03-07,12],cpu1` gives `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodelist)
    return match[1] + (match[2] or "") + match[3] if match else "127.0.0.1"


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device of this process. `ConfigError` for a GPU that is not there."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not count:
        built = f"torch {torch.__version__} is built {'with' if torch.version.cuda else 'without'} CUDA"
        raise ConfigError(
            f"engine.device: cuda was asked for and no GPU is usable on {socket.gethostname()} ({built}); "
            "legal here: cpu, auto"
        )
    if name == "cpu" or not count:
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(
            f"this process is number {local_rank} on {socket.gethostname()}, which shows it {count} GPUs; start at "
            f"most {count} processes a node, or check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def world(device: str = "auto") -> World:
    """This process's world, joined. The first call meets the other ranks; later ones return the same answer."""
    global _current
    if _current is None:
        found = read_environment()
        found = replace(found, device=pick_device(device, found.local_rank))
        if found.world_size > 1:
            _join(found)
        _current = found
    elif device != "auto" and _current.device is not None and _current.device.type != device:
        _current = replace(_current, device=pick_device(device, _current.local_rank))
    return _current


def alone(device: str = "auto") -> World:
    """A world of this process only, whatever the environment says: a task of a fan-out."""
    return World(device=pick_device(device))


def leave() -> None:
    """Take the process group down; `world()` may join another."""
    global _current
    import torch.distributed as dist

    _current = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def join_alone(device: torch.device) -> None:
    """A process group of one, for libraries that insist on having one (DeepSpeed)."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _join(found: World) -> None:
    import torch.distributed as dist

    assert found.master is not None and found.device is not None
    host, _, port = found.master.rpartition(":")
    # Every library that looks for itself (DeepSpeed, NCCL, diffusers) finds the same words.
    words = rank_words(found.rank, found.world_size, found.local_rank, found.local_size, host, port)
    for key, value in words.items():
        os.environ.setdefault(key, value)
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=seconds_in(os.environ, "FINE_DIST_COLLECTIVE_TIMEOUT_S", COLLECTIVE_TIMEOUT_S))
    try:
        dist.init_process_group(_backend(found.device), init_method="env://", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {found.rank} of {found.world_size} on {socket.gethostname()} could not meet the others at "
            f"{found.master}: {str(error).splitlines()[0]}; check that every rank started and that the port is open"
        ) from error


# --- collectives, exact no-ops in a world of one --------------------------------------------------------------------


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.world_size > 1:
        import torch

        all_reduce_sum(torch.zeros(1), world)


def all_reduce_sum(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The sum over ranks, in place; on the tensor's own device (gloo or NCCL)."""
    if world.world_size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The maximum over ranks, in place."""
    if world.world_size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: torch.Tensor, world: World, source: int = 0) -> torch.Tensor:
    """Rank `source`'s values, in place; on the tensor's own device."""
    if world.world_size > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, src=source)
    return tensor


def broadcast_object(value: Any, world: World, source: int = 0) -> Any:
    """A plain value (JSON's types: str, numbers, lists, dicts) of rank `source`, on every rank."""
    return gather_objects(value, world)[source]


def gather_objects(value: Any, world: World) -> list[Any]:
    """A plain value (JSON's types) of every rank, in rank order, on every rank. Nothing is pickled."""
    if world.world_size == 1:
        return [value]
    import json

    import torch
    import torch.distributed as dist

    words = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.zeros(world.world_size, dtype=torch.int64)
    sizes[world.rank] = len(words)
    all_reduce_sum(sizes, world)
    mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    mine[: len(words)] = words
    parts = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(parts, mine)
    return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes.tolist())]
