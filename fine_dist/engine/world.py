"""Which process this is, and among which others, as torchrun, DeepSpeed's launcher, SLURM or Ray say. Without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fine_dist.core.errors import LaunchError
from fine_dist.core.processes import derived_port, int_from_env

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """This process among the others of one run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device | None = None
    master: str | None = None
    """host:port where the ranks meet; None in a world of one."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs, metrics and artifacts."""
        return self.rank == 0

    @property
    def reads_storage(self) -> bool:
        """True on the first rank of each node, which reads from shared storage what the whole node needs."""
        return self.local_rank == 0


def read_environment(env: Mapping[str, str] = os.environ) -> World:
    """The world as the launcher describes it, without a device. `LaunchError` when the variables contradict each other.

    RANK, WORLD_SIZE, LOCAL_RANK (torchrun, the deepspeed launcher, Ray Train) come first. SLURM's are read inside an
    `srun` step only: a batch script also has SLURM_PROCID=0, but it is one process whatever SLURM_NTASKS says.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = int_from_env(env, "RANK"), int_from_env(env, "WORLD_SIZE", least=1)
        local = int_from_env(env, "LOCAL_RANK", rank)
        local_size = int_from_env(env, "LOCAL_WORLD_SIZE", int_from_env(env, "LOCAL_SIZE", size, least=1), least=1)
        master = f"{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        rank, size = int_from_env(env, "SLURM_PROCID"), int_from_env(env, "SLURM_STEP_NUM_TASKS", least=1)
        local = int_from_env(env, "SLURM_LOCALID", 0)
        # SLURM compresses the list, as in `4(x2),3`: the first count is this node's
        # only where nodes are filled evenly, which is what the launchers ask for.
        per_node = re.split(r"[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))[0]
        local_size = int_from_env({"SLURM_STEP_TASKS_PER_NODE": per_node}, "SLURM_STEP_TASKS_PER_NODE", size, least=1)
        host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
        # Every rank computes the port from the same numbers, so nothing has to be exchanged before the ranks can meet.
        port = env.get("MASTER_PORT") or derived_port(
            int_from_env(env, "SLURM_JOB_ID", 0), int_from_env(env, "SLURM_STEP_ID", 0)
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
