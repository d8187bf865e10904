"""Trains a target that shares no frozen genes with others, and so cannot be packed, with the engine's loop."""

from __future__ import annotations

import math
from typing import Any

from fine_dist.artifacts.targets import changed_tensors
from fine_dist.core.config import expand_path
from fine_dist.core.errors import TrainingError
from fine_dist.data.stream import LatentStream, read_all
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.objective import Objective
from fine_dist.engine.fit import fit
from fine_dist.engine.program import FitResult, Program
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.settings import EngineConfig
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.world import World
from fine_dist.family.family_plan import Family
from fine_dist.family.members import Member
from fine_dist.family.recorder import save_result, write_identity
from fine_dist.launchers.state_table import StateTable
from fine_dist.methods.base import Descent
from fine_dist.model.flops import train_flops
from fine_dist.stages.previews import histograms_of


def train_single_target(
    family: Family, member: Member, descent: Descent, table: StateTable, world: World, stopper: Stopper
) -> None:
    """Train one target in its own folder and record its end in the state table; a bad loss marks it as failed."""
    config = family.config
    if descent.trains == "all":
        descent.model.requires_grad_(True)
    run_dir = RunDir(member.folder)
    if world.is_main:
        write_identity(family, member)
    run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
    program = _program(family, member, descent, world)
    flops = family.method(member).cost(descent.model, config.batch).training
    # Stage 2 is short and saves the weights of the last step: no EMA, no previews.
    engine = EngineConfig(**config.engine.model_dump(), ema_decay=0.0, preview_every=10**9)
    try:
        fitted = fit(
            program,
            steps=config.steps,
            global_batch=config.batch,
            optim=config.optim.model_copy(update={"lr": member.lr}),
            engine=engine,
            run_dir=run_dir,
            seed=member.seed,
            title=f"init {member.name}",
            world=world,
            stopper=stopper,
        )
    except TrainingError as error:  # only this target failed, and all ranks raise the error
        if world.is_main:
            table.finish(member.name, "failed", str(error))
        return
    finally:
        program.stream.close()  # type: ignore[attr-defined]
    if world.is_main:
        _save(family, member, fitted, flops)
        table.finish(member.name, "done")


def _program(family: Family, member: Member, descent: Descent, world: World) -> Program:
    config, arch, data = family.config, family.arch(member), member.domain_config.data
    stream = LatentStream(
        data, seed=member.seed, global_batch=config.batch, rank=world.rank, world_size=world.world_size, expect=arch
    )
    held_out = None
    if data.held_out and world.is_main:
        held_out = HeldOutLoss(*read_all(expand_path(data.held_out), data.held_out_samples), config.diffusion)
    return Program(
        model=descent.model,
        objective=Objective(config.diffusion, arch, member.seed),
        stream=stream,
        identity=family.identity(member),
        held_out=held_out,
        histograms=histograms_of(family.method(member)),
        before_step=family.method(member).before_step(descent.model),
        hparams=family.hparams(member),
        evaluate_first=True,
        flops_per_sample=train_flops(arch),
        tokens_per_sample=arch.num_tokens,
    )


def _save(family: Family, member: Member, result: FitResult, flops: float) -> None:
    losses = [row["loss"] for row in result.rows if "loss" in row]
    facts: dict[str, Any] = {
        "steps": result.step,
        "seconds": round(result.seconds, 3),
        "loss": result.losses["loss"] if math.isfinite(result.losses["loss"]) else None,
        "first_loss": losses[0] if losses else None,
        **{name: value for name, value in result.losses.items() if name != "loss"},
        "reason": None,
        "trained": sum(p.numel() for p in result.model.parameters() if p.requires_grad),
    }
    own = changed_tensors(result.model, family.parent)
    save_result(family, member, own, list(result.model.state_dict()), facts, flops_per_sample=flops)
