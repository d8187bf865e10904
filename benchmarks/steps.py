"""Training steps to be timed: of every kind, as the engine's loop takes them, on made-up batches.

A step is a forward pass, a backward pass, clipping and AdamW, and the average (`Backend`, `Ema`). Its parts run inside
named ranges, by which `benchmarks.step_profile` tells where the time goes.

Shapes: B batch, C latent channels, H latent side.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.rows import median_of_ratios
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.model.arch import Arch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RANGE = "part: "
"""What the names of a step's ranges begin with."""


@dataclass(frozen=True)
class StepKind:
    """What is trained: dense, or factors of a rank with all (`joint`) or only sigma training, through a path."""

    name: str
    rank: int | None = None
    joint: bool = True
    path: str = "auto"


class Step:
    """A training step in named parts, run in order: `step()` takes one and gives its wall seconds.

    parts: name -> what it does (`forward`, `backward`, `optimiser`, `EMA`).
    width: D, by which a profile tells tokens from other tensors.
    flops: of its forward and backward pass, counted; 0 where nobody asks.
    taken: {"batch": what the parts read at each step}; `ready` is a smaller one, by which `warm` makes ready what a
           first step makes (the optimizer's state); none: `warm` is an ordinary step.
    """

    def __init__(
        self,
        device: torch.device,
        parts: Mapping[str, Callable[[], object]],
        width: int = 0,
        flops: float = 0.0,
        taken: dict[str, Any] | None = None,
        ready: Any = None,
    ) -> None:
        self.device, self.parts, self.width, self.flops = device, parts, width, flops
        self.taken, self.ready = taken or {}, ready

    def __call__(self) -> float:
        begun = time.perf_counter()
        for name, body in self.parts.items():
            ranged(name, body)
        synchronise(self.device)
        return time.perf_counter() - begun

    def warm(self) -> None:
        """A first step, on the smaller batch if there is one."""
        batch = self.taken.get("batch")
        if self.ready is not None:
            self.taken["batch"] = self.ready
        self()
        self.taken["batch"] = batch


class Bench:
    """Makes training steps of one architecture on one device; `rounds` of them are what `times` takes at most."""

    def __init__(self, arch: Arch, device: torch.device, rounds: int) -> None:
        self.arch, self.device, self.rounds = arch, device, rounds

    def model(self, kind: StepKind) -> nn.Module:
        import torch

        from fine_dist.model.dit import DiT
        from fine_dist.model.factors import FactoredDiT
        from fine_dist.model.roles import train_only

        generator = torch.Generator().manual_seed(0)
        if kind.rank is None:
            return DiT(self.arch, generator=generator).to(self.device)
        model = FactoredDiT(self.arch, kind.rank, generator, kind.path)  # type: ignore[arg-type]
        if not kind.joint:
            train_only(model, "scaler")
        return model.to(self.device)

    def step(
        self, kind: StepKind, batch: int, precision: str = "fp32", recompute: str = "none", compiled: bool = False
    ) -> Step:
        """A training step, as the loop takes it."""
        from fine_dist.diffusion.objective import Objective
        from fine_dist.engine.backends import make_backend
        from fine_dist.engine.compiling import prepare_model
        from fine_dist.engine.ema import Ema
        from fine_dist.engine.optimizer import precision as autocast
        from fine_dist.engine.world import World
        from fine_dist.model.flops import model_cost

        model = self.model(kind)
        engine = EngineConfig.model_validate(
            {"precision": precision, "activation_checkpointing": recompute, "compile": compiled}
        )
        prepare_model(model, engine, self.device)
        backend = make_backend(model, OptimConfig(), engine, World(device=self.device), batch, 1)
        computing = contextlib.ExitStack()
        ema = Ema(backend, engine.ema_decay, engine.ema_warmup)
        objective = Objective(DiffusionConfig(), self.arch, seed=0)
        kept: dict[str, Any] = {"updates": 0, "batch": made_up_batch(self.arch, batch, self.device)}

        def ask(*question: Tensor) -> Tensor:
            return ranged("model", lambda: backend.model(*question))

        def forward() -> None:
            computing.enter_context(backend.computing())
            with autocast(engine, self.device):
                kept["losses"] = objective(ask, kept["batch"])

        def backward() -> None:
            backend.backward(kept.pop("losses"), global_batch=batch, last=True)
            computing.close()

        def average() -> None:
            kept["updates"] += 1
            ema.update(kept["updates"])

        parts = {
            "forward": forward,
            "backward": backward,
            "optimiser": lambda: backend.step(1e-4),
            "EMA": average,
        }
        flops = batch * model_cost(model, batch).training
        ready = None if compiled else made_up_batch(self.arch, 1, self.device)  # another shape is compiled anew
        return Step(self.device, parts, self.arch.hidden_size, flops, kept, ready)

    def times(self, steps: dict[str, Callable[[], float]], within_s: float | None = None) -> dict[str, list[float]]:
        """Figures of every step, taken in turn: `rounds` of them, and fewer (two at least) once the seconds are over.

        Each is made ready before: a first step makes the optimizer's state and compiles what is to be compiled.
        """
        for step in steps.values():
            step.warm() if isinstance(step, Step) else step()
        end = time.perf_counter() + (float("inf") if within_s is None else within_s)
        figures: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(self.rounds):
            if turn >= 2 and time.perf_counter() >= end:
                break
            # every other round in reverse, so that nobody always runs in another's wake
            for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
                figures[name].append(steps[name]())
        return figures


def ranged(name: str, body: Callable[[], Any]) -> Any:
    """What `body` gives, run inside a range that a profiler sees."""
    import torch

    with torch.profiler.record_function(RANGE + name):
        return body()


def synchronise(device: torch.device) -> None:
    """Wait for what the device has still to do."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiles(step: Step) -> str | None:
    """Take the first step of a compiled model: why it ran without the compiler, or none when it did not."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    return next((str(w.message) for w in seen if "torch.compile failed" in str(w.message)), None)


@dataclass(frozen=True)
class MadeUp:
    """A batch of noise."""

    step: int
    latents: Tensor
    labels: Tensor
    positions: Tensor


def made_up_batch(arch: Arch, batch: int, device: torch.device) -> MadeUp:
    import torch

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *arch.latent_shape, generator=generator)
    labels = torch.randint(0, arch.num_classes, (batch,), generator=generator)
    return MadeUp(0, latents.to(device), labels.to(device), torch.arange(batch))


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """The median over rounds of one step's seconds over another's."""
    return median_of_ratios(times[over], times[under])
