"""The training loop, the same for every method, backend and world size.

Everything random is a function of (seed, step, position in the global batch), so neither the number of processes nor a
restart changes what is computed. Starting the same command again continues from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.config import EngineConfig, OptimConfig
from fine_dist.diffusion.schedule import mix
from fine_dist.engine import alike, dist, stopping
from fine_dist.engine.backend import Backend, learning_rate, precision, trainable
from fine_dist.engine.backends import make_backend
from fine_dist.engine.checkpoint import Checkpoints, restore_ema
from fine_dist.engine.dist import World
from fine_dist.engine.ema import Ema
from fine_dist.engine.monitor import Monitor
from fine_dist.engine.program import Fitted, Program, divide_batch
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.watch import Watch
from fine_dist.errors import ConfigError, ResumeLater, ToldElsewhere, TrainingError
from fine_dist.model import flops

_BEFORE_STEP = 0x6265666F7265
"""Keeps the draws of `before_step` apart from every other use of (seed, step)."""


def fit(
    program: Program,
    *,
    steps: int,
    global_batch: int,
    optim: OptimConfig,
    engine: EngineConfig,
    run_dir: RunDir,
    seed: int,
    title: str,
    world: World | None = None,
    stopper: Stopper | None = None,
    claim: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train `program` to `steps` updates, from the newest checkpoint in `run_dir` if there is one.

    global_batch: samples an update, over all ranks and accumulation steps.
    seed:         part of the identity; the program's own randomness is seeded by its maker.
    title:        what the progress bar says.
    claim:        called on every rank once the first step has worked: the run directory may be written to from now on.
    stopper:      who says when to stop, entered already; none: signals, the time limit and words in `run_dir`.

    Raises `ResumeLater` after saving when asked to stop (signal, time limit, STOP file), `TrainingError` for losses
    that are not finite or a rank that died, `CheckpointError` when the checkpoint belongs to another run, `ConfigError`
    when the batch cannot be divided.
    """
    world = world or dist.world(engine.device)
    own = Stopper(run_dir, engine.time_limit_min, world.is_main) if stopper is None else contextlib.nullcontext(stopper)
    with Watch(world), own as asked:
        run = Run(program, steps, global_batch, optim, engine, run_dir, seed, title, world, asked, claim)
        try:
            return run.train()
        finally:
            run.checkpoints.close()
            run.monitor.close()


class Run:
    """One start of a run: the parts, put together, and the loop over them."""

    def __init__(
        self,
        program: Program,
        steps: int,
        global_batch: int,
        optim: OptimConfig,
        engine: EngineConfig,
        run_dir: RunDir,
        seed: int,
        title: str,
        world: World,
        stopper: Stopper,
        claim: Callable[[], None] = lambda: None,
    ) -> None:
        self.program, self.steps, self.global_batch = program, steps, global_batch
        self.optim, self.engine, self.world, self.stopper = optim, engine, world, stopper
        self.seed, self.drawn = seed, torch.Generator()
        self.device = world.device or torch.device("cpu")
        self.micro, self.accumulation = divide_batch(global_batch, engine.micro_batch, world.world_size)
        if engine.threads:
            torch.set_num_threads(engine.threads)
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; a no-op on CPU
        self.shown = self._copy_for_showing()
        prepare_model(program.model, engine)
        alike.broadcast(program.model, world)
        identity = {**program.identity, "seed": seed, "global_batch": global_batch, "trains": _shapes(program.model)}
        self.backend: Backend = make_backend(program.model, optim, engine, world, self.micro, self.accumulation)
        self.ema = Ema(self.backend, engine.ema_decay, engine.ema_warmup)
        self.checkpoints = Checkpoints(run_dir.checkpoints, world, identity, engine.keep_checkpoints)
        self.monitor = Monitor(
            run_dir,
            world,
            title=title,
            steps=steps,
            global_batch=global_batch,
            tokens_per_sample=program.tokens_per_sample,
            flops_per_sample=program.flops_per_sample,
            peak=flops.peak_flops(self.device, engine.precision, engine.peak_tflops) if world.is_main else None,
            log_every=engine.log_every,
        )
        self.held_out: dict[str, float] = {}
        self.begun, self.claim = False, claim
        self.row: dict[str, Any] | None = None
        """The unfinished row of an earlier start."""
        self.bad_steps = 0
        self.overhead_s = 0.0

    def train(self) -> Fitted:
        begun = time.perf_counter()
        step = self.resume()
        alike.check(self.program.model, self.world, self.engine, "at the start")
        batches = self.program.stream.batches(step)
        while step < self.steps:
            batch, waited_s = self.next_batch(batches)
            if self.program.before_step is not None:
                self.program.before_step(step, self.drawn.manual_seed(mix(self.seed, step, _BEFORE_STEP)))
            lr = learning_rate(self.optim, step, self.steps)
            loss, grad_norm, wish = self.update(batch, lr, step)
            self.begin(step)
            step += 1
            if math.isfinite(loss):
                self.ema.update(step)
                bad = getattr(self.program.stream, "bad", 0)
                self.monitor.step(step, loss=loss, grad_norm=grad_norm, lr=lr, waited_s=waited_s, bad=bad)
            if step % self.engine.checkpoint_every == 0 or step == self.steps or wish:
                self.save(step)
            self.look(step)  # after the save: whatever goes wrong in looking, the step is kept
            if wish == stopping.STOP and step < self.steps:
                self.stop(step)
            self.checkpoints.check()
        self.checkpoints.finish()
        return self.fitted(step, time.perf_counter() - begun)

    # --- the parts of a step ----------------------------------------------------------------------------------------

    def next_batch(self, batches: Iterator[Any]) -> tuple[Any, float]:
        """This rank's part of the next global batch, on its device, and the seconds it took to come."""
        begun = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - begun
        if len(batch) != self.micro * self.accumulation:
            raise ConfigError(
                f"the stream gave rank {self.world.rank} {len(batch)} samples where {self.micro} x "
                f"{self.accumulation} are due; make it with the same global batch, rank and world size"
            )
        return batch.to(self.device), waited_s

    def update(self, batch: Any, lr: float, step: int) -> tuple[float, float, int]:
        """One update: (loss over all ranks, gradient norm, greatest wish). A bad loss updates nothing."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in range(self.accumulation):
            micro = batch.part(index * self.micro, self.micro)
            with precision(self.engine, self.device):
                losses = self.program.objective(self.backend.model, micro)
            total += losses.detach().sum(dtype=torch.float64)
            last = index == self.accumulation - 1
            self.backend.backward(losses, global_batch=self.global_batch, last=last)
        loss, wish, bad_ranks = self.agree(float(total))
        if not math.isfinite(loss):
            self.backend.discard()
            self.bad_step(step, f"the loss is {loss} on rank {', '.join(map(str, bad_ranks))}")
            return loss, math.nan, wish
        grad_norm = self.backend.step(lr)
        if not math.isfinite(grad_norm):
            self.bad_step(step, f"the gradient norm is {grad_norm}")
            return math.nan, grad_norm, wish
        return loss, grad_norm, wish

    def agree(self, total: float) -> tuple[float, int, list[int]]:
        """One small all-reduce a step: the mean loss over all ranks' samples, the greatest wish, and who is bad."""
        wish = self.stopper.wish(2 * self.checkpoints.stall_s)
        words = torch.zeros(2 + 2 * self.world.world_size, dtype=torch.float64)
        words[0] = total
        words[2 + self.world.rank] = 0.0 if math.isfinite(total) else 1.0
        words[2 + self.world.world_size + self.world.rank] = wish
        dist.all_reduce_sum(words, self.world)
        bad = words[2 : 2 + self.world.world_size].nonzero().flatten().tolist()
        return float(words[0]) / self.global_batch, int(words[2 + self.world.world_size :].max()), bad

    def bad_step(self, step: int, what: str) -> None:
        """Stop, or count and go on, as configured."""
        self.bad_steps += 1
        self.monitor.skipped()
        where = f"step {step + 1}: {what}"
        why = None
        if self.engine.on_bad_loss == "stop":
            why = (
                f"{where}; nothing was updated and the last good checkpoint is kept. Lower optim.lr, or set "
                "engine.on_bad_loss to skip"
            )
        elif self.bad_steps > self.engine.max_bad_steps:
            why = (
                f"{where}; {self.bad_steps} steps were bad and engine.max_bad_steps is {self.engine.max_bad_steps}. "
                "The last good checkpoint is kept"
            )
        if why:  # all ranks know, one says it
            raise TrainingError(why) if self.world.is_main else ToldElsewhere(why)
        self.monitor.note(f"{where}; the step is skipped ({self.bad_steps} of at most {self.engine.max_bad_steps})")

    # --- between steps ----------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the newest checkpoint, if any, and open the logs: the step to go on from."""
        saved = self.checkpoints.newest()
        if saved is None:
            return 0
        if saved.step > self.steps:
            raise ConfigError(
                f"the checkpoint {saved.folder} is at step {saved.step}, beyond the {self.steps} asked for"
            )
        self.backend.load(saved)
        restore_ema(saved, self.ema, self.backend.pieces())
        self.bad_steps = saved.extra["bad_steps"]
        self.held_out = saved.extra["held_out"]
        saved.close()
        self.row = saved.extra["monitor"]
        if saved.step == self.steps:
            self.begin(saved.step)
        return saved.step

    def begin(self, step: int) -> None:
        """Open the logs, once: the first step has worked, so the run directory may be called this run's."""
        if self.begun:
            return
        self.begun = True
        self.claim()
        self.monitor.start(step, self.row)
        if step == 0:
            if self.program.look_first:
                self.evaluate(0)
            return
        # An earlier start may have saved this step and ended before it had looked at it. Rank 0 knows.
        measures = self.program.held_out is not None and self.world.is_main
        if dist.broadcast_object(measures and not self.monitor.has_row(step, "held_out_loss"), self.world):
            self.look(step)

    def look(self, step: int) -> None:
        """Measure and picture the model when they are due."""
        last = step == self.steps
        if step % self.engine.eval_every == 0 or last:
            self.evaluate(step)
        if step % self.engine.picture_every == 0 or last:
            self.show(step)

    def save(self, step: int) -> None:
        extra = {"monitor": self.monitor.state(), "bad_steps": self.bad_steps, "held_out": self.held_out}
        told = alike.check(self.program.model, self.world, self.engine, f"at step {step}")
        if told:
            self.monitor.note(told)
        self.checkpoints.save(step, self.backend, self.ema, extra)

    def stop(self, step: int) -> None:
        self.checkpoints.finish()
        reasons = dist.gather_objects(self.stopper.reason, self.world)
        reason = next((text for text in reasons if "another rank" not in text), reasons[0])
        raise ResumeLater(f"{reason}; saved at step {step} of {self.steps}, the same command continues")

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss (at the end also of the weights themselves), and show histograms, on rank 0."""
        if self.program.held_out is None and self.program.histograms is None and self.program.texts is None:
            return
        values = self.ema.gather()
        raw = self.backend.weights() if step == self.steps and self.engine.ema_decay else {}
        if self.shown is None:
            return
        model = self.worn(values)
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
        model = self.ema_model()
        if model is not None:
            self.monitor.pictures(step, self.program.pictures(model, step))

    def worn(self, values: dict[str, Tensor]) -> nn.Module:
        """Rank 0's second model with these weights, on its device."""
        assert self.shown is not None
        set_parameters(self.shown, values)
        return self.shown.to(self.device)

    def ema_model(self) -> nn.Module | None:
        """A model with the EMA weights, in eval mode, on rank 0; none on the others (all of them take part)."""
        values = self.ema.gather()
        return None if self.shown is None else self.worn(values)

    def _copy_for_showing(self) -> nn.Module | None:
        """Rank 0's second model: looking at the EMA never touches the weights that train."""
        program = self.program
        looks = program.held_out or program.pictures or program.histograms or program.texts
        wanted = looks or self.engine.backend == "deepspeed"
        if not (self.world.is_main and wanted):
            return None
        return copy.deepcopy(program.model).eval().requires_grad_(False)

    def fitted(self, step: int, seconds: float) -> Fitted:
        rows = self.monitor.rows if self.world.is_main else []
        last = next((row["loss"] for row in reversed(rows) if "loss" in row), math.nan)
        ema = self.ema.gather()
        model = self.program.model
        if self.engine.backend == "deepspeed":
            weights = self.backend.weights()
            if self.shown is not None:
                model = copy.deepcopy(self.shown)
                set_parameters(model, weights)
                for name, p in model.named_parameters():
                    p.requires_grad_(name in weights)
        return Fitted(model, ema, step, {"loss": last, **self.held_out}, rows, seconds, self.world)


# --- helpers --------------------------------------------------------------------------------------------------------


def prepare_model(model: nn.Module, engine: EngineConfig) -> None:
    """Activation checkpointing and compilation, a block at a time. `ConfigError` when the model has no blocks."""
    if engine.activation_checkpointing != "none" and not hasattr(model, "recompute"):
        raise ConfigError(
            f"engine.activation_checkpointing: {type(model).__name__} cannot recompute its blocks; legal: none"
        )
    if hasattr(model, "recompute"):
        model.recompute = engine.activation_checkpointing  # type: ignore[assignment]
    if engine.compile:
        for block in getattr(model, "blocks", [model]):
            compile_or_fall_back(block)


def compile_or_fall_back(block: nn.Module) -> None:
    """Replace a module's forward by its compiled form; the first failure warns once and goes back to eager."""
    eager = block.forward
    compiled = torch.compile(eager)
    chosen = [compiled]

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return chosen[0](*args, **kwargs)
        except Exception as error:  # whatever a compiler throws, eager mode can still say what is really wrong
            if chosen[0] is eager:
                raise
            chosen[0] = eager
            warnings.warn(f"torch.compile failed, running without it: {str(error).splitlines()[0]}", stacklevel=2)
            return eager(*args, **kwargs)

    block.forward = forward


@torch.no_grad()
def set_parameters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into a model's parameters, by name."""
    for name, p in model.named_parameters():
        if name in values:
            p.copy_(values[name])


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in trainable(model).items()}
