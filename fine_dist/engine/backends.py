"""Makes the backend that a config names; DeepSpeed is imported only where it is asked for."""

from __future__ import annotations

from torch import nn

from fine_dist.engine.backend import Backend
from fine_dist.engine.dist import World
from fine_dist.engine.plain_backend import PlainBackend
from fine_dist.engine.settings import EngineConfig, OptimConfig


def make_backend(
    model: nn.Module, optim: OptimConfig, engine: EngineConfig, world: World, micro_batch: int, accumulation: int
) -> Backend:
    """The backend of a config, which takes `model` over and moves it to the world's device."""
    if engine.backend == "plain":
        return PlainBackend(model, optim, world)
    from fine_dist.engine.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(model, optim, engine, world, micro_batch, accumulation)
