"""What stage 1 takes from an ancestor before its first step, computed once for each run directory, by rank 0.

A decomposition of a large ancestor takes minutes, so its result is kept in the run directory (`start.safetensors`) for
every later start of the same run. The other ranks wait for the file, not in a collective, which would time out long
before a large decomposition on few cores has ended. They read what was kept of it and no weights: the training loop
sends them rank 0's.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fine_dist.core.errors import TrainingError
from fine_dist.core.files import library_write
from fine_dist.engine.world import World
from fine_dist.methods.base import Condensation, Method, MethodConfig
from fine_dist.model.dit import DiT
from fine_dist.model.roles import of_role

log = logging.getLogger(__name__)

START = "start.safetensors"
"""File of a run directory that holds what stage 1 started from."""
WAIT_S = 6 * 3600
"""Longest that a rank waits for rank 0's file; the launcher ends the others much sooner when rank 0 fails."""


def start_from_ancestor(
    ancestor: DiT,
    condensation: Condensation,
    method: Method[MethodConfig],
    run_dir: Path,
    seed: int,
    shell: bool,
    world: World,
) -> None:
    """Carry an ancestor's weights over into what stage 1 trains, the same on every rank; say what was carried over.

    Args:
        ancestor: The trained model.
        condensation: What `method.condense` has made. Its module and report are changed.
        method: The method, with its settings filled in (`Method.given`).
        run_dir: Where the start is kept.
        seed: Of the method's random draws.
        shell: Whether the ancestor's embedders and final layer are copied where their shapes are the module's.
        world: This process among the others.
    """
    module = condensation.module
    copied = shell and copy_shell(ancestor, condensation.product(module))
    facts: dict[str, Any] = {}
    if method.traits.carries_over:
        if world.is_main and not (run_dir / START).exists():
            # A checkpoint overwrites every weight, so a start computed now would only delay the resumption by minutes.
            if any((run_dir / "checkpoints").glob("step_*")):
                log.info("ancestor: its weights are not carried over again, the run continues from a checkpoint")
                return
            facts = method.carry_over(
                module, ancestor, torch.Generator().manual_seed(seed), world.device or torch.device("cpu")
            )
            # The other ranks take the file's existence for its
            # completeness, so it must appear under its name in one move.
            with library_write(run_dir / START):
                tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
                save_file(tensors, run_dir / START, {"facts": json.dumps(facts)})
        else:
            facts = _read(run_dir, module, world)
    blocks = facts.pop("carried_over", "")
    condensation.report = {**condensation.report, "carried_over": _describe(copied, blocks), **facts}
    condensation.lines = [*condensation.lines, f"ancestor: {_describe(copied, blocks)}"]


def copy_shell(ancestor: DiT, module: nn.Module) -> bool:
    """Copy the embedders and the final layer where all their names and shapes agree; whether they do."""
    theirs, own_tensors = of_role(ancestor, "shell"), of_role(module, "shell")
    if {name: tensor.shape for name, tensor in theirs.items()} != {
        name: tensor.shape for name, tensor in own_tensors.items()
    }:
        return False
    for name, tensor in own_tensors.items():
        tensor.copy_(theirs[name])
    return True


def _describe(shell: bool, blocks: str) -> str:
    if shell:
        return f"embedders and final layer copied, {blocks or 'blocks random'}"
    return f"{blocks}, embedders and final layer random" if blocks else "no weights copied, the loss alone imitates it"


def _read(run_dir: Path, module: nn.Module, world: World) -> dict[str, Any]:
    """What was kept of the start that rank 0 has written, or is about to write; rank 0 loads it into the module."""
    begun = time.monotonic()
    # Polled: no notification of a new file reaches another node through a network file system.
    while not (run_dir / START).exists():
        if any((run_dir / "checkpoints").glob("step_*")):
            return {}  # rank 0 does not make one: the weights come from a checkpoint
        if time.monotonic() - begun > WAIT_S:
            raise TrainingError(
                f"rank {world.rank} waited {WAIT_S // 3600} hours for {run_dir / START}, which rank 0 writes; is the "
                "run directory on storage that every node shares?"
            )
        time.sleep(0.5)
    if world.is_main:
        module.load_state_dict(load_file(run_dir / START))
    with safe_open(run_dir / START, "pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    return facts
