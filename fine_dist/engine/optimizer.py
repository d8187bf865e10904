"""AdamW, its learning rate schedule, gradient clipping, and the precision of the arithmetic, shared by all backends."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ConfigError
from fine_dist.engine.settings import LoopConfig, OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's state tensors, besides the number of updates."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name. `ConfigError` if there are none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("nothing to train: every parameter of the model is frozen")
    return named


def adamw(
    parameters: list[nn.Parameter], optim: OptimConfig, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """AdamW over one group, fused: one kernel for many parameters.

    Args:
        kind: AdamW or a subclass of it.
    """
    # One group with one learning rate: methods differ in *which* parameters are trained, never in their rates.
    return kind(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)


def clip_divisor(norm: Tensor, clip_norm: float | None) -> Tensor | None:
    """Divisor that limits the global norm of the gradients to `clip_norm`, fp32 []; None without clipping."""
    # At least 1, so that smaller gradients are not scaled up. The 1e-6 is the one in `clip_grad_norm_`.
    return None if clip_norm is None else ((norm + 1e-6) / clip_norm).clamp(min=1.0).float()


@contextlib.contextmanager
def update_only_if(optimizer: torch.optim.Optimizer, good: Tensor, divisor: Tensor | None = None) -> Iterator[None]:
    """A context in which `optimizer.step()` changes nothing, including its number of updates, if `good` is false.

    Gradients are divided by `divisor` inside the update, so that clipping needs no pass of its own.

    The fused kernels read both values on the device, so that the host does not wait. torch.amp uses the same two
    attributes for overflowed gradients and for the loss scale.

    Args:
        good: bool [], on the device of the optimizer's parameters.
        divisor: fp32 [], on the same device. None: gradients are not scaled.
    """
    # torch's fused kernels read these attributes: they skip the update if `found_inf` is 1 and divide by `grad_scale`.
    optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    try:
        yield
    finally:
        # Removed, because they would also apply to later steps.
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]


def updates_of(states: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Numbers of updates in AdamW's states by name, without zeros (a skipped first step leaves a zero).

    The fused optimizer counts on the device, so that all counts are read together.
    """
    counts = {name: state["step"] for name, state in states.items() if "step" in state}
    if not counts:
        return {}
    read = torch.stack([count.reshape(()).float() for count in counts.values()]).tolist()
    return {name: int(count) for name, count in zip(counts, read) if count}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of the update from `step` to `step + 1`, of a total of `steps`."""
    # A fraction is rounded to whole steps, so that the rate of a step does not depend on how the fraction was written.
    warmup = round(optim.warmup_steps * steps) if optim.warmup_steps < 1 else round(optim.warmup_steps)
    if step < warmup:
        # `step + 1`, so that the first update has a rate above 0 and the last step of the warm-up the full rate.
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def set_arithmetic(engine: LoopConfig) -> None:
    """Set the precision of fp32 products and the determinism of this process."""
    tf32 = engine.precision == "tf32"
    # Set in both cases, because the process may have used the other setting before (a notebook, a pack).
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if engine.deterministic:
        # cuBLAS is deterministic only with a workspace of fixed size, whose setting it reads once.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def precision(engine: LoopConfig, device: torch.device) -> Iterator[None]:
    """A context with autocast to bf16 for precision bf16. Weights, gradient sums and losses stay fp32."""
    if engine.precision != "bf16":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
