"""What a loop needs of whatever holds the weights: a small interface, and the plain backend.

A backend owns the trainable parameters, their optimiser and the way gradients are summed over ranks. It shows its
fp32 master weights as *pieces*: flat ranges of named parameters. EMA, checkpoints and gathering work on pieces alone,
so they are the same for one process, ZeRO-1, 2 and 3, and a checkpoint of one is read by any other.

Shapes: P parameters of `numel` values each, flattened; a piece is [stop - start] of them, fp32.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ConfigError
from fine_dist.engine.dist import World, all_reduce_sum
from fine_dist.engine.settings import LoopConfig, OptimConfig

if TYPE_CHECKING:
    from fine_dist.engine.saved import Saved

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of one weight, beside the step count."""


@dataclass(frozen=True)
class Piece:
    """A range of one parameter that this rank keeps: `weight` and `moments` are live, flat fp32 views."""

    name: str
    shape: tuple[int, ...]
    start: int
    weight: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.weight.numel()


class Backend(ABC):
    """Weights, optimiser and gradient sums of one run.

    The calls of a step: `backward` once a micro-batch, then `step`. None of them need wait for the device.
    """

    model: nn.Module
    """What the objective calls."""
    world: World

    @abstractmethod
    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        """Add the gradient of `losses.sum() / global_batch`; `last` marks the step's last micro-batch.

        losses: [b] fp32, one a sample.
        """

    @abstractmethod
    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        """Sum gradients over ranks, clip, update, forget the gradients. The global norm before clipping, a number [].

        good: bool [], on the device: whether the losses of all ranks are finite; none: they are. Where they are not,
        or the norm is not, weights and optimiser stay untouched.
        """

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this rank owns of the trainable weights; over all ranks each value is owned once."""

    @abstractmethod
    def moments(self, piece: Piece) -> dict[str, Tensor]:
        """AdamW's state of a piece (flat fp32 views), empty before the first step."""

    @abstractmethod
    def optimizer_steps(self) -> dict[str, int]:
        """Updates that each owned parameter has had (AdamW's bias correction)."""

    @abstractmethod
    def load(self, saved: Saved) -> None:
        """Set weights and optimiser from a checkpoint of any backend, stage and world size."""

    def gather(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors (fp32, host memory) from per-piece values, on rank 0; empty on the others.

        values: by parameter name, flat, one for each owned piece.
        """
        return {piece.name: values[piece.name].detach().cpu().view(piece.shape).clone() for piece in self.pieces()}

    def weights(self) -> dict[str, Tensor]:
        """All trainable weights, whole, on rank 0."""
        return self.gather({piece.name: piece.weight for piece in self.pieces()})


class PlainBackend(Backend):
    """Every rank has everything; gradients are summed over ranks by all-reduce (none in a world of one)."""

    def __init__(self, model: nn.Module, optim: OptimConfig, world: World) -> None:
        self.world = world
        self.model = model.to(world.device)
        self.clip_norm = optim.clip_norm
        self.named = trainable(self.model)
        self.parameters = list(self.named.values())
        self.optimizer = adamw(self.parameters, optim)

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        (losses.sum() / global_batch).backward()

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        # A parameter that no sample used has a zero gradient, not none: the same arithmetic as under ZeRO.
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.world.world_size > 1:
            self._sum_over_ranks(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        set_lr(self.optimizer, lr)
        finite = norm.isfinite()
        with only_where(self.optimizer, finite if good is None else finite & good):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum_over_ranks(self, gradients: list[Tensor]) -> None:
        """One all-reduce of all gradients."""
        flat = all_reduce_sum(torch.cat([g.reshape(-1) for g in gradients]), self.world)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def pieces(self) -> list[Piece]:
        if not self.world.is_main:
            return []
        return [Piece(name, tuple(p.shape), 0, p.data.view(-1)) for name, p in self.named.items()]

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.named[piece.name], {})
        return {key: state[key].view(-1) for key in MOMENTS if updates_of(state)}

    def optimizer_steps(self) -> dict[str, int]:
        found = {name: updates_of(self.optimizer.state.get(p, {})) for name, p in self.named.items()}
        return {name: updates for name, updates in found.items() if updates}

    def load(self, saved: Saved) -> None:
        for name, p in self.named.items():
            p.data.copy_(saved.whole("weight", name).view_as(p))
            steps = saved.optimizer_steps.get(name, 0)
            if not steps:
                self.optimizer.state.pop(p, None)
                continue
            state = {key: saved.whole(key, name).view_as(p).to(p.device).clone() for key in MOMENTS}
            # A fused optimiser keeps its step count on the device, the others in host memory.
            fused = bool(self.optimizer.defaults.get("fused"))
            state["step"] = torch.tensor(float(steps), device=p.device if fused else "cpu")
            self.optimizer.state[p] = state


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name. `ConfigError` when there is none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ConfigError("nothing to train: every parameter of the model is frozen")
    return named


def adamw(
    parameters: list[nn.Parameter], optim: OptimConfig, kind: type[torch.optim.AdamW] | None = None
) -> torch.optim.AdamW:
    """AdamW (or a kind of it) over one group, fused."""
    return (kind or torch.optim.AdamW)(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


@contextlib.contextmanager
def only_where(optimizer: torch.optim.Optimizer, good: Tensor) -> Iterator[None]:
    """A context in which `optimizer.step()` changes nothing, its count included, where `good` is false.

    good: bool [], on the device of a fused optimiser's parameters; it is not read by the host. The optimiser is told
    in the words that gradient scaling (torch.amp) has for gradients that overflowed.
    """
    optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def updates_of(state: dict[str, Any]) -> int:
    """Updates that AdamW's state of one parameter stands for; a first step that was bad leaves a state of none."""
    return int(state["step"]) if "step" in state else 0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of the update that leads from `step` to `step + 1`, of `steps` in all."""
    warmup = round(optim.warmup_steps * steps) if optim.warmup_steps < 1 else round(optim.warmup_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


@contextlib.contextmanager
def precision(engine: LoopConfig, device: torch.device) -> Iterator[None]:
    """bf16 autocast when asked for; weights, gradients' sums and losses stay fp32."""
    if engine.precision == "fp32":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
