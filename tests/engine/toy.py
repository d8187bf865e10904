"""A small real program for the engine's tests: a DiT or a FINE learngene over made-up latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.config import Config
from fine_dist.core.seeds import mix
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.dist import world
from fine_dist.engine.fit import fit
from fine_dist.engine.program import FitResult, Program
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.world import World
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT
from fine_dist.model.roles import train_only

ARCH = Arch(
    hidden_size=32, num_layers=2, num_heads=2, patch_size=2, in_channels=1, input_size=8, num_classes=10,
    learn_sigma=False,
)  # fmt: skip


@dataclass(frozen=True)
class ToyBatch:
    step: int
    latents: Tensor
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ToyBatch:
        return ToyBatch(self.step, self.latents.to(device), self.labels.to(device), self.positions)

    def part(self, start: int, size: int) -> ToyBatch:
        rows = slice(start, start + size)
        return ToyBatch(self.step, self.latents[rows], self.labels[rows], self.positions[rows])


class ToyStream:
    """Samples that are a function of (step, position) alone; rank r of W has every W-th position."""

    def __init__(self, global_batch: int, world: World, arch: Arch = ARCH) -> None:
        self.global_batch, self.world, self.arch = global_batch, world, arch

    def batches(self, start_step: int = 0) -> Iterator[ToyBatch]:
        step = start_step
        while True:
            positions = torch.arange(self.world.rank, self.global_batch, self.world.world_size)
            latents, labels = [], []
            for position in positions.tolist():
                generator = torch.Generator().manual_seed(mix(7, step, position))
                label = int(torch.randint(0, self.arch.num_classes, (), generator=generator))
                mean = torch.linspace(-1, 1, self.arch.num_classes)[label]
                latents.append(mean + 0.3 * torch.randn(*self.arch.latent_shape, generator=generator))
                labels.append(label)
            yield ToyBatch(step, torch.stack(latents), torch.tensor(labels), positions)
            step += 1


class ToyConfig(Config):
    """What a toy run is started with."""

    kind: str = "dense"
    """dense, joint (genes and sigma train) or sigma (only sigma)."""
    steps: int = 6
    """Updates."""
    global_batch: int = 8
    """Samples an update."""
    rank: int = 16
    """Rank of the factors."""
    path: str = "auto"
    """Compute path of the factors."""
    seed: int = 0
    """Seed."""
    data_hash: str = "abc"
    """Stands for the data manifest's hash."""
    optim: OptimConfig = OptimConfig(lr=1e-3)
    """Optimiser."""
    engine: EngineConfig = EngineConfig(
        device="cpu", ema_decay=0.9, ema_warmup=False, log_every=1, checkpoint_every=2, eval_every=1000
    )
    """Engine."""


def toy_model(config: ToyConfig, arch: Arch = ARCH) -> nn.Module:
    generator = torch.Generator().manual_seed(config.seed)
    if config.kind == "dense":
        model: nn.Module = DiT(arch, generator=generator)
    else:
        model = FactoredDiT(arch, config.rank, generator, config.path)  # type: ignore[arg-type]
        if config.kind == "sigma":
            train_only(model, "scaler")
    # Zero outputs have zero gradients behind them: every parameter should matter from the first step.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adaln" in name or name.startswith("final"):
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def toy_program(config: ToyConfig, here: World, **parts: Any) -> Program:
    model = parts.pop("model", None) or toy_model(config)
    return Program(
        model=model,
        objective=parts.pop("objective", None) or Objective(DiffusionConfig(), ARCH, config.seed),
        stream=parts.pop("stream", None) or ToyStream(config.global_batch, here),
        identity={"arch": ARCH.model_dump(), "kind": config.kind, "rank": config.rank, "data": config.data_hash},
        flops_per_sample=1e6,
        tokens_per_sample=ARCH.num_tokens,
        **parts,
    )


def toy_fit(
    folder: Path | str, config: ToyConfig, program: Program | None = None, here: World | None = None, **parts: Any
) -> FitResult:
    here = here or world("cpu")
    bound = {key: getattr(config.engine, key) for key in ("precision", "ema_decay")}
    identity = {**config.model_dump(mode="json", exclude={"steps", "engine"}), "engine": bound}
    with RunDir(folder).open("toy", identity, here) as run_dir:
        return fit(
            program or toy_program(config, here, **parts),
            steps=config.steps,
            global_batch=config.global_batch,
            optim=config.optim,
            engine=config.engine,
            run_dir=run_dir,
            seed=config.seed,
            title="toy",
            world=here,
            claim=lambda: run_dir.claim(config) if here.is_main else None,
        )


def engine(**fields: Any) -> EngineConfig:
    """The toy's engine config with some fields replaced."""
    return EngineConfig.model_validate({**ToyConfig().engine.model_dump(), **fields})


@dataclass
class Outcome:
    """A run's end in plain values, comparable over processes."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)


def toy_outcome(folder: Path | str, config: ToyConfig) -> Outcome:
    """Run and give what came out (weights and EMA on rank 0 only)."""
    fitted = toy_fit(folder, config)
    if not fitted.world.is_main:
        return Outcome()
    weights = {name: p.detach().clone() for name, p in fitted.model.named_parameters()}
    return Outcome([row["loss"] for row in fitted.rows if "loss" in row], weights, fitted.ema)
