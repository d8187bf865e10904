"""Activation checkpointing and compilation of a model's blocks.

Blocks of one class share one compiled function. Their parameters are inputs of its graph, so that further layers and
models of other depths need no compilation.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from fine_dist.core.errors import ConfigError
from fine_dist.engine.settings import EngineConfig, LoopConfig
from fine_dist.model.dit import DiT

log = logging.getLogger(__name__)


def prepare_model(model: nn.Module, engine: EngineConfig, device: torch.device) -> None:
    """Set up the residual stream's dtype, activation checkpointing and compilation, block by block.

    Raises:
        ConfigError: The model does not support a setting.
    """
    if engine.residual_dtype == "bf16":
        streams = [module for module in model.modules() if isinstance(module, DiT)]
        if not streams:
            raise ConfigError(f"engine.residual_dtype: {type(model).__name__} has no residual stream; legal: fp32")
        for stream in streams:
            stream.residual_dtype = torch.bfloat16
    if engine.activation_checkpointing != "none" and not hasattr(model, "recompute"):
        raise ConfigError(
            f"engine.activation_checkpointing: {type(model).__name__} cannot recompute its blocks; legal: none"
        )
    if hasattr(model, "recompute"):
        model.recompute = engine.activation_checkpointing  # type: ignore[assignment]
    if compiles(engine, device):
        compile_or_fall_back(list(getattr(model, "blocks", [model])))


def compiles(engine: LoopConfig, device: torch.device) -> bool:
    """Whether blocks are compiled. The setting's default: on a GPU with the plain backend and a C compiler."""
    if engine.compile is not None:
        return engine.compile
    # With a sharding backend compilation must be requested. Inductor builds the launchers of
    # its kernels with a C compiler even on a GPU, hence the last condition.
    plain_gpu = device.type == "cuda" and engine.backend == "plain"
    return plain_gpu and any(map(shutil.which, ("cc", "gcc", "clang")))


def compile_or_fall_back(blocks: list[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Replace each block's forward by the compiled one of its class. If compilation fails, warn and run without it.

    Args:
        blocks: The blocks.
        backend: Backend of `torch.compile`.
    """
    # Imported late, because dynamo takes two seconds.
    from torch._dynamo.exc import TorchDynamoException

    # `forward` of the class and not of the instance, so that all blocks
    # of a class share one code object and one set of graphs.
    eager: dict[type, Callable[..., Any]] = {type(block): type(block).forward for block in blocks}
    in_use = {kind: torch.compile(forward, backend=backend) for kind, forward in eager.items()}

    # `kind` is the class at this time, because FSDP2 later replaces it by a derived class.
    def forward(kind: type, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return in_use[kind](block, *args, **kwargs)
        # Raised by dynamo and inductor if they cannot compile. All other errors are the model's and pass through, such
        # as running out of memory, and the exception with which torch ends a recomputation.
        except TorchDynamoException as error:
            # The eager function cannot raise this itself; the error comes from other compiled
            # code inside it, and running it again would repeat the error.
            if in_use[kind] is eager[kind]:
                raise
            # All classes fall back together, because a missing compiler or driver
            # would make the others fail as well, minutes later.
            in_use.update(eager)
            reason = " ".join(str(error).split()[:40])
            log.warning("torch.compile failed, and blocks run without it: %s", reason)
            return eager[kind](block, *args, **kwargs)

    for block in blocks:
        # An attribute of the instance, so that blocks of other models are not affected.
        block.forward = MethodType(functools.partial(forward, type(block)), block)
