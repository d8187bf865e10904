"""Creates the backend of a config. DeepSpeed and FSDP2 are imported only if they are used."""

from __future__ import annotations

import torch
from torch import nn

from fine_dist.engine.backend import Backend
from fine_dist.engine.plain_backend import PlainBackend
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.world import World


def make_backend(
    model: nn.Module, optim: OptimConfig, engine: EngineConfig, world: World, micro_batch: int, accumulation: int
) -> Backend:
    """Create the backend of a config, which owns `model` from then on and moves it to the world's device."""
    if engine.backend == "plain":
        reduce_dtype = torch.bfloat16 if engine.reduce_dtype == "bf16" else torch.float32
        return PlainBackend(model, optim, world, reduce_dtype, engine.precision == "bf16" and engine.bf16_copies)
    if engine.backend == "fsdp2":
        # Imported here, because torch's FSDP imports much that no other backend needs.
        from fine_dist.engine.fsdp_backend import FsdpBackend

        return FsdpBackend(model, optim, engine, world)
    # DeepSpeed is an optional package, and importing it takes seconds.
    from fine_dist.engine.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(model, optim, engine, world, micro_batch, accumulation)
