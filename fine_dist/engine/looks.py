"""Looking at a model while it trains: held-out losses, pictures, histograms and texts, from the averaged weights.

Rank 0 has a second model to look at, so that looking never touches the weights that train; the others help to gather.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fine_dist.engine.backend import Backend
from fine_dist.engine.dist import World
from fine_dist.engine.ema import Ema
from fine_dist.engine.monitor import Monitor
from fine_dist.engine.program import Program
from fine_dist.engine.settings import EngineConfig


def second_model(program: Program, engine: EngineConfig, world: World) -> nn.Module | None:
    """A copy of the program's model as it is before anything prepares it for training; rank 0's, if it is looked at."""
    looks = program.held_out or program.pictures or program.histograms or program.texts
    wanted = looks or engine.backend == "deepspeed"
    if not (world.is_main and wanted):
        return None
    return copy.deepcopy(program.model).eval().requires_grad_(False)


class Looks:
    """What is looked at, and when. All ranks call it alike.

    model: rank 0's second model. steps: at the last one everything is looked at once more.
    """

    def __init__(
        self,
        model: nn.Module | None,
        program: Program,
        engine: EngineConfig,
        steps: int,
        device: torch.device,
        backend: Backend,
        ema: Ema,
        monitor: Monitor,
    ) -> None:
        self.model, self.program, self.engine, self.steps, self.device = model, program, engine, steps, device
        self.backend, self.ema, self.monitor = backend, ema, monitor
        self.held_out: dict[str, float] = {}
        """The last measurement; part of a checkpoint."""

    def due(self, step: int) -> bool:
        """Whether there is something to look at after so many updates."""
        return step == self.steps or step % self.engine.eval_every == 0 or step % self.engine.picture_every == 0

    def look(self, step: int) -> None:
        """Measure and picture the model when they are due."""
        last = step == self.steps
        if step % self.engine.eval_every == 0 or last:
            self.evaluate(step)
        if step % self.engine.picture_every == 0 or last:
            self.show(step)

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss (at the end also of the weights themselves), and show histograms, on rank 0."""
        if self.program.held_out is None and self.program.histograms is None and self.program.texts is None:
            return
        values = self.ema.gather()
        raw = self.backend.weights() if step == self.steps and self.engine.ema_decay else {}
        if self.model is None:
            return
        model = self._with(values)
        if self.program.held_out is not None:
            measured = {key: float(value) for key, value in self.program.held_out(model).items()}
            if raw:
                set_parameters(model, raw)
                found = self.program.held_out(model)
                measured |= {f"raw_{key}": float(value) for key, value in found.items()}
                set_parameters(model, values)
            self.held_out = measured
            self.monitor.scalars(step, self.held_out)
        if self.program.histograms is not None:
            self.monitor.histograms(step, self.program.histograms(model))
        if self.program.texts is not None:
            self.monitor.texts(step, self.program.texts(model))

    def show(self, step: int) -> None:
        """Pictures made with the EMA weights, on rank 0."""
        if self.program.pictures is None:
            return
        values = self.ema.gather()
        if self.model is not None:
            self.monitor.pictures(step, self.program.pictures(self._with(values), step))

    def _with(self, values: dict[str, Tensor]) -> nn.Module:
        """The second model with these weights, on its device."""
        assert self.model is not None
        set_parameters(self.model, values)
        return self.model.to(self.device)

    def trained(self) -> nn.Module:
        """The trained model; under ZeRO, which scatters it, a gathered copy on rank 0."""
        if self.engine.backend != "deepspeed":
            return self.program.model
        weights = self.backend.weights()
        if self.model is None:
            return self.program.model
        model = copy.deepcopy(self.model)
        set_parameters(model, weights)
        for name, p in model.named_parameters():
            p.requires_grad_(name in weights)
        return model


@torch.no_grad()
def set_parameters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into a model's parameters, by name."""
    for name, p in model.named_parameters():
        if name in values:
            p.copy_(values[name])
