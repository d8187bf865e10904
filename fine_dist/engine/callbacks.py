"""Callbacks of the training loop: held-out losses, preview images, histograms and texts.

They use the EMA weights in a second model on rank 0, so that no measurement can change the weights that are trained.
The other ranks only take part in gathering the EMA."""

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
"""Time limit of a preview: this many seconds or this fraction of the training time so far, whichever is longer."""


def evaluation_model(program: Program, engine: EngineConfig, world: World) -> nn.Module | None:
    """A frozen copy of the program's model, made before the model is prepared for training; None if not needed.

    Only rank 0 needs it, and only if something is evaluated or the backend shards the trained model.
    """
    evaluates = program.held_out or program.previews or program.histograms or program.texts
    if not (world.is_main and (evaluates or engine.backend != "plain")):
        return None
    # Copied before compilation, sharding and hooks, which belong
    # to the trained model and cannot be copied.
    return copy.deepcopy(program.model).eval().requires_grad_(False)


class EvaluationCallback:
    """Evaluates the EMA weights at regular steps. All ranks call it at the same points.

    Args:
        model: Rank 0's second model (`evaluation_model`).
        program: Defines the measurements, previews, histograms and texts.
        engine: Settings with the intervals.
        steps: The last step of the run, after which everything is evaluated once more.
        device: Device of the evaluation on rank 0.
        backend: Gathers the trained weights.
        ema: The EMA of the weights.
        monitor: Receives the results.
        stopper: Collects requests to stop, which end a preview early.
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
        """Results of the last measurement by name; part of a checkpoint."""
        # All ranks take part in gathering the EMA, and only rank 0's program knows whether it is needed.
        uses_averages = program.held_out or program.histograms or program.texts
        self._evaluates, self._previews = broadcast_object(
            [uses_averages is not None, program.previews is not None], backend.world
        )

    def is_due(self, step: int) -> bool:
        """Whether an evaluation or a preview is due after `step` updates."""
        return step == self.steps or step % self.engine.eval_every == 0 or step % self.engine.preview_every == 0

    def after_step(self, step: int, seconds: float) -> None:
        """Run the evaluation and the preview that are due after `step` updates, except the preview of the last step.

        Args:
            step: Updates that are done.
            seconds: Seconds of training so far.
        """
        last = step == self.steps
        if step % self.engine.eval_every == 0 or last:
            self.evaluate(step)
        if step % self.engine.preview_every == 0 and not last:
            self.preview(step, seconds)

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss and log histograms and texts, on rank 0.

        At the last step the raw weights are measured as well, with the prefix `raw_`.
        """
        program = self.program
        if not self._evaluates:
            return
        averages = self.ema.gather()
        # Gathering is collective, so all ranks take part before those without a second model return.
        raw = self.backend.weights() if step == self.steps and self.engine.ema_decay else {}
        if self.model is None:
            return
        model = self._with(averages)
        if program.held_out is not None:
            # The EMA is measured first and restored after the raw
            # weights, because histograms and texts below use it.
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
        """Log images sampled from the EMA, on rank 0.

        The time limit is a tenth of the training time so far, but at least a minute.
        """
        if not self._previews:
            return
        averages = self.ema.gather()
        if self.model is not None and self.program.previews is not None:
            budget = Budget(self.stopper, max(PREVIEW_S, PREVIEW_FRACTION * seconds))
            self.monitor.images(step, self.program.previews(self._with(averages), step, budget))

    def _with(self, values: dict[str, Tensor]) -> nn.Module:
        """The second model with the given weights, on the device."""
        assert self.model is not None
        model = self.model.to(self.device)  # first, so that the values are copied to the device once
        set_parameters(model, values)
        return model

    def trained_model(self) -> nn.Module:
        """The model with its trained weights; with a sharding backend a copy on rank 0 with the gathered weights."""
        if self.engine.backend == "plain":
            return self.program.model
        weights = self.backend.weights()
        if self.model is None:
            return self.program.model
        # Another copy, because later previews still use the second model.
        model = copy.deepcopy(self.model)
        set_parameters(model, weights)
        for name, p in model.named_parameters():
            p.requires_grad_(name in weights)
        return model


@torch.no_grad()
def set_parameters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into the model's parameters of the same names."""
    for name, p in model.named_parameters():
        if name in values:
            p.copy_(values[name])
