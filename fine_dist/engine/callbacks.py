"""Callbacks of the training loop: held-out losses, preview images, histograms and texts.

They see the averaged weights, in a second model that rank 0 has for this purpose, so that no measurement can touch the
weights that train. The other ranks only help to gather the averages.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fine_dist.engine.backend import Backend
from fine_dist.engine.dist import broadcast_object
from fine_dist.engine.ema import Ema
from fine_dist.engine.monitor import Monitor
from fine_dist.engine.program import Program
from fine_dist.engine.settings import EngineConfig
from fine_dist.engine.stopping import Budget, Stopper
from fine_dist.engine.world import World

PREVIEW_S, PREVIEW_FRACTION = 60.0, 0.1
"""What previews may take: so many seconds, or this fraction of the training time so far where that is more."""


def evaluation_model(program: Program, engine: EngineConfig, world: World) -> nn.Module | None:
    """A frozen copy of the program's model, made before anything prepares that one for training.

    Only rank 0 needs it, and only where something is evaluated or where a backend shards the model that trains.
    """
    evaluates = program.held_out or program.previews or program.histograms or program.texts
    if not (world.is_main and (evaluates or engine.backend != "plain")):
        return None
    # Copied before compilation, sharding or hooks: those belong
    # to the model that trains and cannot be copied afterwards.
    return copy.deepcopy(program.model).eval().requires_grad_(False)


class EvaluationCallback:
    """Evaluates and shows the averaged weights every so many steps. All ranks call it at the same points.

    Args:
        model: Rank 0's second model (`evaluation_model`).
        program: Says what is measured and shown.
        engine: Says how often.
        steps: The last step of the run, after which everything is measured and shown once more.
        device: Where rank 0 measures.
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
        stopper: Stopper,
    ) -> None:
        self.stopper = stopper
        self.model, self.program, self.engine, self.steps, self.device = model, program, engine, steps, device
        self.backend, self.ema, self.monitor = backend, ema, monitor
        self.held_out: dict[str, float] = {}
        """The last measurement; part of a checkpoint."""
        # Every rank gathers averages for rank 0, and only rank 0's program knows whether something uses them.
        uses_averages = program.held_out or program.histograms or program.texts
        self._evaluates, self._previews = broadcast_object(
            [uses_averages is not None, program.previews is not None], backend.world
        )

    def is_due(self, step: int) -> bool:
        """Whether something is measured or shown after `step` updates."""
        return step == self.steps or step % self.engine.eval_every == 0 or step % self.engine.preview_every == 0

    def after_step(self, step: int, seconds: float) -> None:
        """Measure and show what is due after `step` updates; after the last, previews wait until its result is saved.

        Args:
            seconds: What training has taken so far.
        """
        last = step == self.steps
        if step % self.engine.eval_every == 0 or last:
            self.evaluate(step)
        if step % self.engine.preview_every == 0 and not last:
            self.preview(step, seconds)

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss and write histograms and texts, on rank 0.

        At the last step the weights without averaging are measured as well, under the prefix `raw_`.
        """
        program = self.program
        if not self._evaluates:
            return
        averages = self.ema.gather()
        # Gathering is collective, so every rank takes part before those without a second model leave.
        raw = self.backend.weights() if step == self.steps and self.engine.ema_decay else {}
        if self.model is None:
            return
        model = self._with(averages)
        if program.held_out is not None:
            # The averages come first and are put back after the raw
            # weights: histograms and texts below show the averages.
            measured = {key: float(value) for key, value in program.held_out(model).items()}
            if raw:
                set_parameters(model, raw)
                measured |= {f"raw_{key}": float(value) for key, value in program.held_out(model).items()}
                set_parameters(model, averages)
            self.held_out = measured
            self.monitor.scalars(step, self.held_out)
        if program.histograms is not None:
            self.monitor.histograms(step, program.histograms(model))
        if program.texts is not None:
            self.monitor.texts(step, program.texts(model))

    def preview(self, step: int, seconds: float) -> None:
        """Write images that the averaged weights generate, on rank 0.

        They may take a tenth of the time that training has taken so far, and a minute at least.
        """
        if not self._previews:
            return
        averages = self.ema.gather()
        if self.model is not None and self.program.previews is not None:
            budget = Budget(self.stopper, max(PREVIEW_S, PREVIEW_FRACTION * seconds))
            self.monitor.images(step, self.program.previews(self._with(averages), step, budget))

    def _with(self, values: dict[str, Tensor]) -> nn.Module:
        """The second model with these weights, on its device."""
        assert self.model is not None
        model = self.model.to(self.device)  # first, so that no value takes the way through host memory twice
        set_parameters(model, values)
        return model

    def trained_model(self) -> nn.Module:
        """The model with its trained weights; where a backend shards it, a copy on rank 0 with the gathered weights."""
        if self.engine.backend == "plain":
            return self.program.model
        weights = self.backend.weights()
        if self.model is None:
            return self.program.model
        # A second copy, because the evaluation goes on using the first one for its previews.
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
