"""A stage from its settings to its artifact: open the run directory, build, train, save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.config import expand_path
from fine_dist.data.sources import locate
from fine_dist.engine import dist
from fine_dist.engine.fit import fit
from fine_dist.engine.program import FitResult
from fine_dist.engine.run_cost import RunCost
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.world import World
from fine_dist.model.artifact import ArtifactManifest, load_artifact, save_artifact
from fine_dist.stages.blueprint import Stage, hparams
from fine_dist.stages.build import Plan, make_program
from fine_dist.stages.checking import check_settings
from fine_dist.stages.repa import with_alignment
from fine_dist.stages.settings import StageConfig


def train_stage(stage: Stage[Any], build: Callable[[World], Plan]) -> Path:
    """Open the run directory, build the model, train it, save it; the artifact's folder. A finished run is left alone.

    Args:
        stage: The stage with its settings.
        build: Makes what is trained, the same on every rank.
    """
    config: StageConfig = stage.config
    kind, artifact = stage.kind, stage.product
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = dist.world(config.engine.device)
    folder = Path(expand_path(config.run_dir)) / artifact
    check_settings(config, world.world_size)
    identity = stage.identity()
    with RunDir(folder.parent).open(kind, identity, world) as run_dir:
        done = run_dir.done
        # Before anything is built: a study calls every stage again,
        # and one that is done must cost no more than reading a file.
        if done is not None and done.get("steps", 0) >= config.steps:
            if world.is_main:
                load_artifact(folder, artifact)
                print(f"{kind}: finished before; the {artifact} is in {folder}")
            return folder
        plan = with_alignment(config, build(world), world)
        program = make_program(config, plan, world, identity)
        program.hparams = hparams(kind, plan.method.config, plan.arch, config, seed=config.seed, lr=config.optim.lr)
        flops = plan.training_flops(config.batch)
        if world.is_main:
            print("\n".join(plan.condensation.lines), end="\n" if plan.condensation.lines else "")
            what = f"{plan.arch.name}, {config.steps} steps of {config.batch}"
            print(f"{kind}: {what}; files are in {run_dir.path}", flush=True)

        def save(result: FitResult) -> None:
            """Write the artifact and DONE.json: from here on the run is finished, whatever happens to its previews."""
            if not world.is_main:
                return
            manifest = write_artifact(config, plan, result, artifact, folder)
            cost = RunCost.of(
                steps=result.step,
                batch=config.batch,
                flops_per_sample=flops,
                seconds=result.seconds,
                stored=manifest["num_numbers"],
                trained=sum(p.numel() for p in result.ema.values()),
            )
            run_dir.finish(steps=result.step, losses=result.losses, seconds=result.seconds, cost=cost.to_json())
            losses = ", ".join(f"{describe_loss(name)} {value:.4f}" for name, value in result.losses.items())
            size = f"{manifest['num_numbers']:,} numbers, {manifest['bytes'] / 2**20:.1f} MiB"
            print(f"{kind}: {losses}; {size} in {folder}", flush=True)

        fit(
            program,
            steps=config.steps,
            global_batch=config.batch,
            optim=config.optim,
            engine=config.engine,
            run_dir=run_dir,
            seed=config.seed,
            title=f"{kind} {plan.arch.name}",
            world=world,
            claim=lambda: run_dir.claim(config) if world.is_main else None,
            finished=save,
        )
        # Readers' threads and memory maps end here: a study run in
        # one process opens the next stage's shards right after.
        program.stream.close()  # type: ignore[attr-defined]
    return folder


def describe_loss(name: str) -> str:
    """The key of a loss as a reader would call it."""
    if name.startswith("raw_"):
        return f"{describe_loss(name.removeprefix('raw_'))} of the non-EMA weights"
    if name.startswith("loss_"):
        return f"{name.removeprefix('loss_')} term"
    return {"loss": "training loss", "held_out_loss": "held-out loss"}.get(name, name)


def write_artifact(config: StageConfig, plan: Plan, result: FitResult, kind: str, folder: Path) -> ArtifactManifest:
    """Write what was trained, with the averages in place of the weights; its manifest."""
    prefix = plan.condensation.prefix
    return save_artifact(
        folder,
        kind=kind,
        method=plan.method.config.model_dump(mode="json"),
        arch=plan.arch,
        tensors=ema_tensors(result, prefix),
        raw=raw_tensors(result, prefix),
        extra={
            **plan.metadata,
            "steps": result.step,
            "losses": result.losses,
            "batch": config.batch,
            "seed": config.seed,
            **sampling_facts(config, plan),
            **plan.condensation.report,
        },
    )


def sampling_facts(config: StageConfig, plan: Plan) -> dict[str, Any]:
    """What a model must be sampled and measured with: its diffusion, its sampler, and what made its latents."""
    manifest, _ = locate(expand_path(str(config.data.shards)), config.data)
    facts: dict[str, Any] = {
        "diffusion": config.diffusion.model_dump(),
        "sampler": config.sampler.model_dump(),
        "codec": {"name": manifest.codec, "scaling_factor": manifest.scale, "shift_factor": manifest.shift},
    }
    if len(manifest.class_names) == plan.arch.num_classes:
        facts["class_names"] = list(manifest.class_names)
    return facts


def raw_tensors(result: FitResult, prefix: str) -> dict[str, Tensor]:
    """What was trained, as it is; empty where the EMA is the same."""
    state = {name: p for name, p in result.model.named_parameters() if name in result.ema and name.startswith(prefix)}
    # A run without averaging has both the same; storing them twice would double the artifact.
    if all(p.detach().cpu().equal(result.ema[name]) for name, p in state.items()):
        return {}
    return {name.removeprefix(prefix): p.detach() for name, p in state.items()}


def ema_tensors(result: FitResult, prefix: str) -> dict[str, Tensor]:
    """The state dict of what is kept, with the EMA in place of what was trained."""
    # The EMA covers what trains and nothing else, so buffers and frozen tensors come from the model.
    state = {**result.model.state_dict(), **result.ema}
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
