"""What condense and train share: a stage's settings, the program that the engine runs, and models read from disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_dist.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EngineConfig,
    LaunchConfig,
    OptimConfig,
    SamplerConfig,
    expand_path,
)
from fine_dist.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fine_dist.engine.dist import World
    from fine_dist.engine.loop import Program
    from fine_dist.model.dit import DiT
    from fine_dist.model.zoo import Arch

PRELOAD = (
    "torch.utils.tensorboard",
    "fine_dist.engine.loop",
    "fine_dist.data.stream",
    "fine_dist.diffusion.sample",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
)
"""What a local pool imports once for all jobs of a stage that trains."""
HELD_OUT_LIMIT = 2048
"""Held-out samples that are measured, at most: four timesteps each."""


class StageConfig(Config):
    """Settings of a stage that trains."""

    run_dir: str = "runs/run"
    """Where everything is written. The same command again continues what is there."""
    seed: int = Field(0, ge=0)
    """Seeds the initialisation, the order of the data, timesteps, noise and label drop."""
    steps: int = Field(1000, ge=1)
    """Updates."""
    batch: int = Field(64, ge=1)
    """Samples an update, over all processes."""
    data: DataConfig = DataConfig()
    """Latents."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    engine: EngineConfig = EngineConfig()
    """How the loop runs."""
    sampler: SamplerConfig = SamplerConfig()
    """How pictures are sampled for TensorBoard."""
    launch: LaunchConfig = LaunchConfig()
    """What the job needs, where it is submitted."""


@dataclass
class Start:
    """What a stage trains, as every rank builds it alike."""

    model: DiT
    method: dict[str, Any]
    """The method's settings, for the manifest."""
    identity: dict[str, Any]
    """What else must match to resume (JSON)."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else is worth keeping in the manifest (JSON)."""


def train_stage(
    config: StageConfig, stage: str, artifact: str, build: Callable[[World], Start], **objective: Any
) -> Path:
    """Open the run directory, build the model, train it, save it; the artifact's folder. A finished run is left alone.

    stage:     `condense` or `train`.
    artifact:  `learngene` or `model`: the kind of the artifact, and its folder in the run directory.
    objective: further arguments of the loss (teacher, distill).
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
    with RunDir(folder.parent).open(config, stage, world) as run_dir:
        if run_dir.done is not None:
            if world.is_main:
                load_artifact(folder, artifact)
                print(f"{stage}: finished before; the {artifact} is in {folder}")
            return folder
        start = build(world)
        arch = start.model.arch
        program = make_program(config, start, world, **objective)
        if world.is_main:
            print(
                f"{stage}: {arch.name}, {config.steps} steps of {config.batch}; files are in {run_dir.path}", flush=True
            )
        fitted = fit(
            program,
            steps=config.steps,
            global_batch=config.batch,
            optim=config.optim,
            engine=config.engine,
            run_dir=run_dir,
            seed=config.seed,
            title=f"{stage} {arch.name}",
            world=world,
        )
        program.stream.close()  # type: ignore[attr-defined]
        if world.is_main:
            facts = {"steps": fitted.step, "losses": fitted.losses}
            made = {"batch": config.batch, "seed": config.seed, "diffusion": config.diffusion.model_dump()}
            tensors = {**fitted.model.state_dict(), **fitted.ema}  # the EMA in place of what was trained
            manifest = save_artifact(
                folder,
                kind=artifact,
                method=start.method,
                arch=arch,
                tensors=tensors,
                extra={**facts, **made, **start.about},
            )
            run_dir.finish(**facts, seconds=fitted.seconds)
            losses = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in fitted.losses.items())
            size = f"{manifest['num_numbers']:,} numbers, {manifest['bytes'] / 2**20:.1f} MiB"
            print(f"{stage}: {losses}; {size} in {folder}")
    return folder


def make_program(config: StageConfig, start: Start, world: World, **objective: Any) -> Program:
    """What the engine trains, and how it is looked at."""
    from fine_dist.data.stream import LatentStream, read_all
    from fine_dist.diffusion.objective import HeldOut, Objective
    from fine_dist.engine.loop import Program
    from fine_dist.model.flops import train_flops

    arch = start.model.arch
    if config.data.shards is None:
        raise ConfigError("data.shards is not set: give the folder that `python -m fine_dist.encode` wrote")
    stream = LatentStream(
        config.data,
        seed=config.seed,
        global_batch=config.batch,
        rank=world.rank,
        world_size=world.world_size,
        expect=arch,
    )
    held_out = None
    if config.data.held_out and world.is_main:
        held_out = HeldOut(*read_all(expand_path(config.data.held_out), limit=HELD_OUT_LIMIT), config.diffusion)
    return Program(
        model=start.model,
        objective=Objective(config.diffusion, arch, config.seed, **objective),
        stream=stream,
        identity={"arch": arch.model_dump(), "data": stream.manifest.hash, "method": start.method, **start.identity},
        held_out=held_out,
        pictures=Pictures(config, arch),
        histograms=sigma_histograms,
        flops_per_sample=train_flops(arch),
        tokens_per_sample=arch.num_tokens,
    )


class Pictures:
    """TensorBoard's pictures: samples of the EMA model, a row a class, and sigma by layer where there is one."""

    def __init__(self, config: StageConfig, arch: Arch):
        self.config, self.arch = config, arch

    def __call__(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        import torch

        from fine_dist.diffusion.sample import grid, sample

        classes = torch.arange(min(self.arch.num_classes, 10)).repeat_interleave(4)
        images = sample(
            model,
            labels=classes,
            arch=self.arch,
            config=self.config.sampler,
            diffusion=self.config.diffusion,
            seed=self.config.seed,
        )
        zoom = max(1, 64 // self.arch.input_size)
        pictures = {"samples": grid(images, 10, zoom=zoom)}
        for kind, table in sigma_tables(model).items():
            scale = table.abs().amax().clamp_min(1e-12)
            pictures[f"sigma/{kind}"] = grid((table / scale)[None, None], 1, zoom=8, gap=0)
        return pictures


def sigma_tables(model: nn.Module) -> dict[str, Tensor]:
    """`{kind: [L, R]}` of a model made of factors, components sorted by their mean; empty for a dense one."""
    from fine_dist.model.factors import FactoredDiT
    from fine_dist.model.zoo import KINDS

    if not isinstance(model, FactoredDiT):
        return {}
    tables = {kind: model.sigma_table(kind) for kind in KINDS}
    return {kind: table[:, table.mean(0).argsort(descending=True)] for kind, table in tables.items()}


def sigma_histograms(model: nn.Module) -> dict[str, Tensor]:
    """sigma by kind, for TensorBoard's histograms."""
    return {f"sigma/{kind}": table for kind, table in sigma_tables(model).items()}


def load_model(path: str | Path) -> tuple[DiT, dict[str, Any]]:
    """A dense DiT from a folder: a model, an initialised target (merged), a learngene (merged), or a run's directory.

    Returns it with what is worth saying about it: kind, method, hash, folder, and the stage's own extras.
    """
    from fine_dist.methods import from_manifest
    from fine_dist.model.artifact import load_artifact, read_manifest
    from fine_dist.model.dit import DiT
    from fine_dist.stages.descendants import load_descendant

    folder = find_artifact(path)
    if read_manifest(folder)["kind"] == "sigma":
        model, artifact = load_descendant(folder)
    else:
        artifact = load_artifact(folder)
        if artifact.kind == "learngene":
            import torch

            method = from_manifest(artifact.method)
            learngene = method.learngene(artifact.arch, torch.Generator())
            if learngene is None:
                raise ArtifactError(f"{folder}: method {artifact.method['name']} has no learngene to merge")
            learngene.load_state_dict(artifact.tensors)
            state = method.merge(learngene)
        else:
            state = artifact.tensors
        model = DiT(artifact.arch)
        model.load_state_dict(state)
    about = {"kind": artifact.kind, "method": artifact.method, "hash": artifact.hash, "folder": str(folder)}
    return model, {**about, **artifact.extra}


def find_artifact(path: str | Path) -> Path:
    """The artifact in a folder: itself, or the `model`, `sigma` or `learngene` of a run's directory."""
    folder = Path(expand_path(str(path)))
    for place in (folder, *(folder / name for name in ("model", "sigma", "learngene"))):
        if (place / "manifest.json").is_file():
            return place
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist; give a folder that condense, init or train wrote")
    raise ArtifactError(
        f"{folder} holds no model, sigma or learngene: not a run's directory, or the run is not finished"
    )
