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
"""AdamW's state of one weight, apart from the count of updates."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name. `ConfigError` when there is none."""
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
    # One group and one rate: methods differ in *what* trains, never in how fast a part of it does.
    return kind(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)


def clip_divisor(norm: Tensor, clip_norm: float | None) -> Tensor | None:
    """What gradients are divided by to have at most this global norm, fp32 []; None where nothing is clipped."""
    # At least 1, because gradients below the limit are not scaled up. The 1e-6 is that of `clip_grad_norm_`.
    return None if clip_norm is None else ((norm + 1e-6) / clip_norm).clamp(min=1.0).float()


@contextlib.contextmanager
def only_where(optimizer: torch.optim.Optimizer, good: Tensor, divisor: Tensor | None = None) -> Iterator[None]:
    """A context in which `optimizer.step()` changes nothing where `good` is false, its count of updates included.

    Gradients are divided by `divisor` inside the update, so clipping is no pass over them of its own.

    The fused kernels read both on the device, so the host does not wait for them. They are what gradient scaling
    (torch.amp) sets for gradients that overflowed, and for the scale of the loss.

    Args:
        good: bool [], on the device of the optimizer's parameters.
        divisor: fp32 [], on that device; None: gradients stay as they are.
    """
    # Names that torch's fused kernels look for. They skip the update where `found_inf` is 1 and divide by `grad_scale`.
    optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    try:
        yield
    finally:
        # They are attributes of the optimizer, so what stays behind would also scale a later step.
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]


def updates_of(states: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Updates in AdamW's states by name, without those that have none: a first step that was skipped leaves a zero.

    The fused optimizer counts on the device, so all counts are read together.
    """
    counts = {name: state["step"] for name, state in states.items() if "step" in state}
    if not counts:
        return {}
    read = torch.stack([count.reshape(()).float() for count in counts.values()]).tolist()
    return {name: int(count) for name, count in zip(counts, read) if count}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all groups one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of the update that leads from `step` to `step + 1`, of `steps` in all."""
    # A fraction is rounded to whole steps, so that the rate of a step does not depend on how the fraction was written.
    warmup = round(optim.warmup_steps * steps) if optim.warmup_steps < 1 else round(optim.warmup_steps)
    if step < warmup:
        # `step + 1`: an update with rate 0 would be wasted, and the last step of the warm-up reaches the full rate.
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def set_arithmetic(engine: LoopConfig) -> None:
    """Set what this process does in fp32 products, and whether every run gives the same bits."""
    tf32 = engine.precision == "tf32"
    # Set in both directions, because the process may have run with the other setting before (a notebook, a pack).
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if engine.deterministic:
        # cuBLAS chooses a fixed order of sums only with a workspace of a fixed size, which it reads once.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def precision(engine: LoopConfig, device: torch.device) -> Iterator[None]:
    """Autocast to bf16 when asked for; weights, sums of gradients and losses stay fp32."""
    if engine.precision != "bf16":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
