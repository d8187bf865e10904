"""`python -m fine_dist.condense`: stage 1, train a learngene (FINE, arXiv 2409.19289, section 3.2)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_dist.cli import parse
from fine_dist.errors import ConfigError, guard
from fine_dist.methods import AnyMethod, FineConfig, build
from fine_dist.model.zoo import Arch
from fine_dist.stages import PRELOAD, StageConfig, Start, load_model, train_stage

if TYPE_CHECKING:
    from fine_dist.engine.dist import World
    from fine_dist.model.dit import DiT


class CondenseConfig(StageConfig):
    """Stage 1: train a learngene of an ancestor's architecture, from random factors or from an ancestor's weights."""

    run_dir: str = "runs/condense"
    """Where everything is written; the learngene lands in its `learngene/`."""
    arch: Arch = Field(default_factory=Arch)
    """The ancestor's architecture."""
    method: AnyMethod = FineConfig()
    """How layers share weights."""
    ancestor: str | None = None
    """Folder of a trained dense model of this architecture (method.start decompose, and distill)."""
    ancestor_licence: str | None = None
    """Licence of the ancestor's weights; kept in the learngene's manifest."""
    distill: float = Field(0.0, ge=0)
    """Weight of the mean squared difference to the ancestor's full output, added to the diffusion loss."""


def learngene(config: CondenseConfig) -> DiT:
    """The module that is trained, as the method and the seed make it."""
    import torch

    method = build(config.method)
    module = method.learngene(config.arch, torch.Generator().manual_seed(config.seed))
    if module is None:
        raise ConfigError(f"method.name: {config.method.name} has no stage 1; train it directly with fine_dist.train")
    return module


def run(config: CondenseConfig) -> Path:
    """Train the learngene; returns its folder. Raises `ResumeLater` when stopped early."""
    needs = config.distill > 0 or getattr(config.method, "start", "joint") == "decompose"
    if needs and not config.ancestor:
        raise ConfigError("ancestor: decompose and distill need a trained model; give its folder with --ancestor")
    ancestor, about = load_model(config.ancestor) if config.ancestor else (None, {})
    if ancestor is not None and ancestor.arch != config.arch:
        raise ConfigError(f"ancestor: {config.ancestor} is {ancestor.arch}, and arch says {config.arch}")
    report: dict[str, Any] = {}

    def make(world: World) -> Start:
        import torch

        module = learngene(config)
        if getattr(config.method, "start", "joint") == "decompose" and ancestor is not None:
            fit = build(config.method).fit(module, ancestor, torch.Generator().manual_seed(config.seed))
            report.update(fit.error)
            if world.is_main:
                print("\n".join(fit.lines()), flush=True)
        if ancestor is not None:
            ancestor.eval().requires_grad_(False).to(world.device)
        source = {"path": config.ancestor, "hash": about.get("hash"), "licence": config.ancestor_licence}
        return Start(
            module,
            method=config.method.model_dump(),
            identity={"ancestor": about.get("hash"), "distill": config.distill},
            about={"ancestor": source, "decomposition_error": report},
        )

    teacher = ancestor if config.distill > 0 else None
    return train_stage(config, "condense", "learngene", make, teacher=teacher, distill=config.distill)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(CondenseConfig, argv, "python -m fine_dist.condense")
        config: CondenseConfig = call.config
        if call.dry_run:
            import torch

            from fine_dist.stages.estimates import dry_run

            with torch.device("meta"):
                module = learngene(config)
            print("\n".join(dry_run(config, config.arch, module, getattr(module, "rank", None))))
            return 0
        from launchers.entry import launch

        return launch("fine_dist.condense", config, call.launcher)

    return guard(body)


__all__ = ["PRELOAD", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
