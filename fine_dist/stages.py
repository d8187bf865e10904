"""What condense and train share: a stage's settings, the program that the engine runs, and models read from disk."""

from __future__ import annotations

from collections.abc import Callable
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
    dump_yaml,
    expand_path,
)
from fine_dist.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fine_dist.engine.dist import World
    from fine_dist.engine.loop import Fitted, Program
    from fine_dist.engine.memory import Memory
    from fine_dist.engine.run_dir import RunDir
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
ASSUMED_TFLOPS = 120.0
"""What `--dry-run` supposes of an accelerator: 40% of an A100's bf16 peak. `fine_dist.plan` takes a measured rate."""
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


def train_stage(
    config: StageConfig, kind: str, build: Callable[[World], tuple[DiT, dict[str, Any]]], **objective: Any
) -> tuple[Fitted, RunDir, World, dict[str, Any]] | None:
    """Open the run directory, build the model, train it. None when the run was finished before.

    build:     makes the model on every rank alike, and says what must match to resume.
    objective: further arguments of the loss (teacher, distill).
    """
    import torch

    from fine_dist.engine import dist
    from fine_dist.engine.loop import fit
    from fine_dist.engine.run_dir import RunDir

    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = dist.world(config.engine.device)
    run_dir = RunDir(expand_path(config.run_dir)).open(config, kind, world)
    if run_dir.done is not None:
        run_dir.close()
        return None
    try:
        model, identity = build(world)
        program = make_program(config, model, world, identity, **objective)
        if world.is_main:
            print(f"{kind}: {model.arch.name}, {config.steps} steps of {config.batch}; files are in {run_dir.path}")
        fitted = fit(
            program,
            steps=config.steps,
            global_batch=config.batch,
            optim=config.optim,
            engine=config.engine,
            run_dir=run_dir,
            seed=config.seed,
            title=f"{kind} {model.arch.name}",
            world=world,
        )
        program.stream.close()  # type: ignore[attr-defined]
    except BaseException:
        run_dir.close()
        raise
    return fitted, run_dir, world, identity


def make_program(config: StageConfig, model: DiT, world: World, identity: dict[str, Any], **objective: Any) -> Program:
    """What the engine trains, and how it is looked at."""
    from fine_dist.data.stream import LatentStream, read_all
    from fine_dist.diffusion.loss import HeldOut, Objective
    from fine_dist.engine.flops import train_flops
    from fine_dist.engine.loop import Program

    arch = model.arch
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
        model=model,
        objective=Objective(config.diffusion, arch, config.seed, **objective),
        stream=stream,
        identity={"arch": arch.model_dump(), "data": stream.manifest.hash, **identity},
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
            model,  # type: ignore[arg-type]
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


def final_state(fitted: Fitted) -> dict[str, Tensor]:
    """The trained model's whole state with the EMA in place of what was trained (rank 0)."""
    return {**fitted.model.state_dict(), **fitted.ema}


def load_model(path: str | Path) -> tuple[DiT, dict[str, Any]]:
    """A dense DiT from a folder: a model, an initialised target (merged), a learngene (merged), or a run's directory.

    Returns it with what is worth saying about it: kind, method, hash, folder, and the stage's own extras.
    """
    from fine_dist.methods import from_manifest
    from fine_dist.methods.descendant import load_descendant
    from fine_dist.model.artifact import load_artifact, read_manifest
    from fine_dist.model.dit import DiT

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


def dry_run(config: StageConfig, arch: Arch, model: DiT, rank: int | None) -> list[str]:
    """The resolved config, counts and estimates, as lines to print."""
    from fine_dist.engine.dist import read_environment
    from fine_dist.engine.flops import train_flops
    from fine_dist.model.factors import FactoredDiT, role

    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[role(name)] = counts.get(role(name), 0) + parameter.numel()
    total = sum(counts.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    launch = config.launch
    world_size = max(read_environment().world_size, launch.nodes * launch.processes)
    micro = config.engine.micro_batch or max(1, config.batch // world_size)
    memory = stage_memory(config, arch, total, trained, rank, world_size, micro)
    flops = train_flops(arch) * config.batch
    hours = flops * config.steps / (ASSUMED_TFLOPS * 1e12 * world_size) / 3600
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    lines = [
        dump_yaml(config).rstrip(),
        "",
        f"model: {arch.name}, {total:,} numbers ({parts}), {trained:,} of them train",
    ]
    if isinstance(model, FactoredDiT):
        lines.append(
            f"compute paths at {micro} samples: " + ", ".join(f"{k} {p}" for k, p in model.paths(micro).items())
        )
    lines += [
        f"work: {config.steps:,} steps of {config.batch} samples, {flops / 1e12:.3g} TFLOP a step, "
        f"{flops * config.steps / 1e15:.3g} PFLOP in all",
        f"time: {hours:.2g} h, if each of {world_size} processes does {ASSUMED_TFLOPS:g} TFLOP/s",
        f"memory of a process ({world_size} of them, micro-batch {micro}, {config.engine.backend}, "
        f"{config.engine.precision}):",
        *memory.lines(),
        "dry run: nothing was done",
    ]
    return lines


def stage_memory(
    config: StageConfig, arch: Arch, total: int, trained: int, rank: int | None, world_size: int, micro: int
) -> Memory:
    """The memory of one process of a stage."""
    from fine_dist.engine.memory import estimate

    return estimate(
        arch,
        config.engine,
        micro_batch=micro,
        world_size=world_size,
        num_params=total,
        num_trained=trained,
        rank=rank,
    )
