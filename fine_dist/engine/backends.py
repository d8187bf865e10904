"""The backend of a config: plain, or DeepSpeed's ZeRO, which is imported only where it is asked for."""

from __future__ import annotations

from torch import nn

from fine_dist.engine.backend import Backend, PlainBackend
from fine_dist.engine.dist import World
from fine_dist.engine.settings import EngineConfig, OptimConfig


def make_backend(
    model: nn.Module, optim: OptimConfig, engine: EngineConfig, world: World, micro: int, accumulation: int
) -> Backend:
    """The backend of a config, holding `model` (moved to the world's device)."""
    if engine.backend == "plain":
        return PlainBackend(model, optim, world)
    from fine_dist.engine.backend_deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(model, optim, engine, world, micro, accumulation)
