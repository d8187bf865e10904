"""Rank and world size of this process, from the variables of torchrun, DeepSpeed, SLURM or Ray. Without torch."""

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
    """This process and the number of processes of its run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank among the processes of this node."""
    local_size: int = 1
    """Number of processes on this node."""
    device: torch.device | None = None
    """Device of this process; None if it has not been chosen yet."""
    master: str | None = None
    """host:port of the rendezvous; None without a launcher."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes logs, metrics and artifacts."""
        return self.rank == 0

    @property
    def reads_storage(self) -> bool:
        """Whether this is the first rank of its node, which reads files for the whole node from shared storage."""
        return self.local_rank == 0


def read_environment(env: Mapping[str, str] = os.environ) -> World:
    """Return the world that the launcher's variables describe, without a device; one process without a launcher.

    RANK, WORLD_SIZE and LOCAL_RANK (torchrun, deepspeed, Ray Train) take precedence. SLURM's variables are used only
    in an `srun` step: a batch script also has SLURM_PROCID=0, but is one process for every value of SLURM_NTASKS.

    Raises:
        LaunchError: A variable is no integer or out of range.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = int_from_env(env, "RANK"), int_from_env(env, "WORLD_SIZE", least=1)
        local = int_from_env(env, "LOCAL_RANK", rank)
        local_size = int_from_env(env, "LOCAL_WORLD_SIZE", int_from_env(env, "LOCAL_SIZE", size, least=1), least=1)
        master = f"{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        rank, size = int_from_env(env, "SLURM_PROCID"), int_from_env(env, "SLURM_STEP_NUM_TASKS", least=1)
        local = int_from_env(env, "SLURM_LOCALID", 0)
        # The list has the form `4(x2),3`. The first count is this node's if all nodes have as many
        # tasks, which the launchers request.
        per_node = re.split(r"[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))[0]
        local_size = int_from_env({"SLURM_STEP_TASKS_PER_NODE": per_node}, "SLURM_STEP_TASKS_PER_NODE", size, least=1)
        host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", ""))
        # Every rank derives the same port from the job's ids, because ranks cannot communicate before they know it.
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
    """Return the first host of a SLURM node list: `gpu[03-07,12],cpu1` gives `gpu03`. Without hosts: 127.0.0.1."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodelist)
    return match[1] + (match[2] or "") + match[3] if match else "127.0.0.1"
