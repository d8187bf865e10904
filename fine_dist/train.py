"""`python -m fine_dist.train`: stage 3, train an ordinary dense DiT from an initialised target, or from scratch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.cli import parse
from fine_dist.config import expand_path
from fine_dist.errors import ConfigError, guard
from fine_dist.methods import AnyMethod, HeConfig, build
from fine_dist.model.zoo import Arch
from fine_dist.stages import PRELOAD, StageConfig, Start, load_model, train_stage

if TYPE_CHECKING:
    from fine_dist.engine.dist import World
    from fine_dist.model.dit import DiT


class TrainConfig(StageConfig):
    """Stage 3: train a dense DiT with all its weights free, a fresh optimiser and a fresh EMA."""

    run_dir: str = "runs/train"
    """Where everything is written; the model lands in its `model/`."""
    start: str | None = None
    """Folder of an initialised target, a model or a learngene to start from; none: `method` makes the start."""
    arch: Arch | None = None
    """Architecture; none: that of `start`."""
    method: AnyMethod = HeConfig()
    """Without `start`: how the weights begin (`he` is from scratch)."""
    learngene: str | None = None
    """The learngene that `method` starts from, when it needs one."""


def starting_model(config: TrainConfig) -> tuple[DiT, dict[str, Any]]:
    """The dense model before training, and where it came from."""
    import torch

    from fine_dist.model.artifact import load_artifact

    if config.start:
        model, about = load_model(config.start)
        if config.arch is not None and model.arch != config.arch:
            raise ConfigError(
                f"arch: {config.start} is {model.arch}, and the config says {config.arch}; leave arch out"
            )
        return model.requires_grad_(True), about
    if config.arch is None:
        raise ConfigError("arch: give an architecture (such as DiT-B/2-L6), or a start to take it from")
    method = build(config.method)
    artifact = load_artifact(expand_path(config.learngene), "learngene") if config.learngene else None
    generator = torch.Generator().manual_seed(config.seed)
    model = method.descend(artifact, config.arch, generator)
    if not all(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"method.name: a {config.method.name} target is made by fine_dist.init; give its folder as start"
        )
    return model, {"method": config.method.model_dump(), "hash": artifact.hash if artifact else None}


def run(config: TrainConfig) -> Path:
    """Train the model; returns its folder. Raises `ResumeLater` when stopped early."""

    def make(world: World) -> Start:
        model, origin = starting_model(config)
        about = {"start": config.start, "origin": origin["hash"]}
        return Start(model, method=origin["method"], identity={"origin": origin["hash"]}, about=about)

    return train_stage(config, "train", "model", make)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(TrainConfig, argv, "python -m fine_dist.train")
        config: TrainConfig = call.config
        if call.dry_run:
            from fine_dist.model.zoo import arch
            from fine_dist.stages.estimates import dry_run

            model = _shape_only(config, arch("DiT-B/2"))
            print("\n".join(dry_run(config, model.arch, model, None)))
            return 0
        from launchers.entry import launch

        return launch("fine_dist.train", config, call.launcher)

    return guard(body)


def _shape_only(config: TrainConfig, fallback: Arch) -> DiT:
    """The model without memory for its weights; a start that does not exist yet counts as `fallback`."""
    import torch

    from fine_dist.model.artifact import read_manifest
    from fine_dist.model.dit import DiT
    from fine_dist.stages import find_artifact

    arch = config.arch
    if arch is None and config.start and Path(expand_path(config.start)).exists():
        arch = Arch.model_validate(read_manifest(find_artifact(config.start))["arch"])
    if arch is None:
        print(f"start {config.start} is not there yet: counts and estimates are for {fallback.name}\n")
    with torch.device("meta"):
        return DiT(arch or fallback)


__all__ = ["PRELOAD", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
