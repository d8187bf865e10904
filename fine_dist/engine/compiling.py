"""How a model's blocks are run: recomputed in the backward pass, compiled once for all of them.

Blocks of one class share one compiled function: their parameters are inputs of it, so layers and depths beyond the
first compile nothing again.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from fine_dist.core.errors import ConfigError
from fine_dist.engine.settings import EngineConfig


def prepare_model(model: nn.Module, engine: EngineConfig, device: torch.device) -> None:
    """Activation checkpointing and compilation, a block at a time. `ConfigError` when the model has no blocks."""
    if engine.activation_checkpointing != "none" and not hasattr(model, "recompute"):
        raise ConfigError(
            f"engine.activation_checkpointing: {type(model).__name__} cannot recompute its blocks; legal: none"
        )
    if hasattr(model, "recompute"):
        model.recompute = engine.activation_checkpointing  # type: ignore[assignment]
    if compiles(engine, device):
        compile_or_fall_back(list(getattr(model, "blocks", [model])))


def compiles(engine: EngineConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as the config says; by itself on a GPU beside a C compiler, without ZeRO."""
    if engine.compile is not None:
        return engine.compile
    plain_gpu = device.type == "cuda" and engine.backend == "plain"
    return plain_gpu and any(map(shutil.which, ("cc", "gcc", "clang")))


def compile_or_fall_back(blocks: list[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Replace the blocks' forward by their class's compiled one; the first failure warns, and all go back to eager.

    backend: torch.compile's.
    """
    eager: dict[type, Callable[..., Any]] = {type(block): type(block).forward for block in blocks}
    chosen = {kind: torch.compile(forward, backend=backend) for kind, forward in eager.items()}

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = type(block)
        try:
            return chosen[kind](block, *args, **kwargs)
        except Exception as error:  # whatever a compiler throws, eager mode can still say what is really wrong
            if chosen[kind] is eager[kind]:
                raise
            chosen.update(eager)
            warnings.warn(f"torch.compile failed, running without it: {str(error).splitlines()[0]}", stacklevel=2)
            return eager[kind](block, *args, **kwargs)

    for block in blocks:
        block.forward = MethodType(forward, block)
