"""How a model's blocks are run: recomputed in the backward pass, and compiled once for all of them.

Blocks of one class share one compiled function. Their parameters are its inputs, so layers and depths beyond the first
compile nothing new.
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
        ConfigError: The model has no blocks for what is asked.
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
    """Whether blocks are compiled: as the config says, or else on a GPU, beside a C compiler, without sharding."""
    if engine.compile is not None:
        return engine.compile
    # Where a backend shards, compilation is left to whoever asks for it. Inductor builds the
    # launchers of its kernels with a C compiler even on a GPU, hence the last condition.
    plain_gpu = device.type == "cuda" and engine.backend == "plain"
    return plain_gpu and any(map(shutil.which, ("cc", "gcc", "clang")))


def compile_or_fall_back(blocks: list[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Replace each block's forward by its class's compiled one. When compilation fails, warn and run all without it.

    Args:
        backend: As `torch.compile` takes it.
    """
    # a process that compiles nothing need not wait two seconds for dynamo
    from torch._dynamo.exc import TorchDynamoException

    # `forward` of the class, not of the instance: all blocks of
    # a class then share one code object and one set of graphs.
    eager: dict[type, Callable[..., Any]] = {type(block): type(block).forward for block in blocks}
    chosen = {kind: torch.compile(forward, backend=backend) for kind, forward in eager.items()}

    # The class is the one that a block has now: FSDP2 gives it another, derived one.
    def forward(kind: type, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return chosen[kind](block, *args, **kwargs)
        # What dynamo and inductor raise when they cannot compile. All other errors are the model's own and pass
        # through, among them running out of memory, and the exception by which torch ends a recomputation.
        except TorchDynamoException as error:
            # The function that runs without compilation cannot raise this for compiling; it is
            # an error of somebody else's compiled code inside, and falling back would repeat it.
            if chosen[kind] is eager[kind]:
                raise
            # All classes fall back together: what failed here (a compiler,
            # a driver) fails for the others as well, minutes later.
            chosen.update(eager)
            reason = " ".join(str(error).split()[:40])
            log.warning("torch.compile failed, and blocks run without it: %s", reason)
            return eager[kind](block, *args, **kwargs)

    for block in blocks:
        # An attribute of the instance: the class stays as it is, and blocks of other models run as before.
        block.forward = MethodType(functools.partial(forward, type(block)), block)
