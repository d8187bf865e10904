"""A stage from its settings to its artifact: open the run directory, build, train, save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.config import expand_path
from fine_dist.stages.build import Plan, make_program
from fine_dist.stages.config import StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from fine_dist.engine.dist import World
    from fine_dist.engine.program import FitResult


def train_stage(config: StageConfig, stage: str, artifact: str, build: Callable[[World], Plan]) -> Path:
    """Open the run directory, build the model, train it, save it; the artifact's folder. A finished run is left alone.

    stage:    `condense` or `train`.
    artifact: `learngene` or `model`: the kind of the artifact, and its folder in the run directory.
    """
    import torch

    from fine_dist.engine import dist
    from fine_dist.engine.loop import fit
    from fine_dist.engine.run_dir import RunDir
    from fine_dist.model.artifact import load_artifact, save_artifact

    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = dist.world(config.engine.device)
    folder = Path(expand_path(config.run_dir)) / artifact
    identity = config.identity()
    with RunDir(folder.parent).open(stage, identity, world) as run_dir:
        done = run_dir.done
        if done is not None and done.get("steps", 0) >= config.steps:
            if world.is_main:
                load_artifact(folder, artifact)
                print(f"{stage}: finished before; the {artifact} is in {folder}")
            return folder
        plan = build(world)
        program = make_program(config, plan, world, identity)
        if world.is_main:
            print("\n".join(plan.condensation.lines), end="\n" if plan.condensation.lines else "")
            what = f"{plan.arch.name}, {config.steps} steps of {config.batch}"
            print(f"{stage}: {what}; files are in {run_dir.path}", flush=True)
        fitted = fit(
            program,
            steps=config.steps,
            global_batch=config.batch,
            optim=config.optim,
            engine=config.engine,
            run_dir=run_dir,
            seed=config.seed,
            title=f"{stage} {plan.arch.name}",
            world=world,
            claim=lambda: run_dir.claim(config) if world.is_main else None,
        )
        program.stream.close()  # type: ignore[attr-defined]
        if world.is_main:
            facts = {"steps": fitted.step, "losses": fitted.losses}
            made = {"batch": config.batch, "seed": config.seed, **used(config, plan)}
            manifest = save_artifact(
                folder,
                kind=artifact,
                method=plan.method.config.model_dump(mode="json"),
                arch=plan.arch,
                tensors=kept_tensors(fitted, plan.condensation.prefix),
                raw=raw_tensors(fitted, plan.condensation.prefix),
                extra={**plan.about, **facts, **made, **plan.condensation.report},
            )
            write_hparams(config, plan, fitted, stage, run_dir.tensorboard)
            run_dir.finish(**facts, seconds=fitted.seconds)
            losses = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in fitted.losses.items())
            size = f"{manifest['num_numbers']:,} numbers, {manifest['bytes'] / 2**20:.1f} MiB"
            print(f"{stage}: {losses}; {size} in {folder}")
    return folder


def write_hparams(config: StageConfig, plan: Plan, fitted: FitResult, stage: str, folder: Path) -> None:
    """The run as a row of TensorBoard's table of hyperparameters."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    settings: dict[str, Any] = {"method": plan.method.config.name, "architecture": plan.arch.name}
    settings |= {"depth": plan.arch.num_layers, "batch": config.batch, "steps": config.steps, "seed": config.seed}
    settings |= {"lr": config.optim.lr, "precision": config.engine.precision}
    for key, value in plan.method.config.model_dump(mode="json", exclude={"name"}).items():
        if isinstance(value, (int, float, str, bool)):
            settings[f"method.{key}"] = value
    losses = fitted.losses
    kept = [key for key in losses if key != "loss" and not key.startswith("raw_")]
    metrics = {f"{stage}/final_{key}": losses[key] for key in kept if key in losses}
    metrics = metrics or {f"{stage}/final_loss": losses["loss"]}
    with SummaryWriter(str(folder)) as board:
        for summary in hparams(settings, metrics):
            board.file_writer.add_summary(summary)
        for name, value in metrics.items():
            board.add_scalar(name, value, fitted.step)


def used(config: StageConfig, plan: Plan) -> dict[str, Any]:
    """What a model must be sampled and measured with: its diffusion, its sampler, and what made its latents."""
    from fine_dist.data.sources import locate

    manifest, _ = locate(expand_path(str(config.data.shards)), config.data)
    found: dict[str, Any] = {
        "diffusion": config.diffusion.model_dump(),
        "sampler": config.sampler.model_dump(),
        "codec": {"name": manifest.codec, "scaling_factor": manifest.scaling_factor},
    }
    if len(manifest.class_names) == plan.arch.num_classes:
        found["class_names"] = list(manifest.class_names)
    return found


def raw_tensors(fitted: FitResult, prefix: str) -> dict[str, Tensor]:
    """What was trained, as it is; empty where the EMA is the same."""
    state = {name: p for name, p in fitted.model.named_parameters() if name in fitted.ema and name.startswith(prefix)}
    if all(p.detach().cpu().equal(fitted.ema[name]) for name, p in state.items()):
        return {}
    return {name.removeprefix(prefix): p.detach() for name, p in state.items()}


def kept_tensors(fitted: FitResult, prefix: str) -> dict[str, Tensor]:
    """The state dict of what is kept, with the EMA in place of what was trained."""
    state = {**fitted.model.state_dict(), **fitted.ema}
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
