"""The training loop, the same for every method, backend and world size.

Everything random is a function of (seed, step, position in the global batch), so neither the number of processes nor a
restart changes what is computed. Starting the same command again continues from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ConfigError, ResumeLater, ToldElsewhere, TrainingError
from fine_dist.diffusion.random_draws import mix
from fine_dist.engine import alike, dist, stopping
from fine_dist.engine.allocator import keep_freed_memory
from fine_dist.engine.backend import Backend, learning_rate, precision, trainable
from fine_dist.engine.backends import make_backend
from fine_dist.engine.checkpoint import Checkpoints, restore_ema
from fine_dist.engine.compiling import prepare_model
from fine_dist.engine.dist import World
from fine_dist.engine.ema import Ema
from fine_dist.engine.looks import Looks, second_model
from fine_dist.engine.monitor import Monitor
from fine_dist.engine.outcome import Later, Taken, agree
from fine_dist.engine.program import Fitted, Program, divide_batch
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.watch import Watch
from fine_dist.model import flops
from fine_dist.model.layers import emulates_bf16

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
        if engine.keep_freed_memory and self.device.type == "cpu":
            keep_freed_memory()
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; a no-op on CPU
        shown = second_model(program, engine, world)
        prepare_model(program.model, engine, self.device)
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
        self.looks = Looks(shown, program, engine, steps, self.device, self.backend, self.ema, self.monitor)
        self.late = self.device.type != "cpu"
        """Whether a step is read while the next one is under way. On CPU it is over when its calls return."""
        self.taken: Taken | None = None
        """The step that was taken and is not read yet."""
        self.step_s = 0.0
        self.begun, self.claim = False, claim
        self.row: dict[str, Any] | None = None
        """The unfinished row of an earlier start."""
        self.bad_steps = 0

    def train(self) -> Fitted:
        begun = time.perf_counter()
        step = self.resume()
        alike.check(self.program.model, self.world, self.engine, "at the start")
        batches = self.program.stream.batches(step)
        while step < self.steps:
            started = time.perf_counter()
            batch, waited_s = self.next_batch(batches)
            if self.program.before_step is not None:
                self.program.before_step(step, self.drawn.manual_seed(mix(self.seed, step, _BEFORE_STEP)))
            total = self.gradients(batch)
            wish = self.hear()  # of the step before, while the device is at this one
            self.taken = self.update(total, step, waited_s)
            self.step_s = time.perf_counter() - started
            step += 1
            if wish or self.is_due(step):
                wish = max(wish, self.hear())
            if step % self.engine.checkpoint_every == 0 or step == self.steps or wish:
                self.save(step)
            self.looks.look(step)  # after the save: whatever goes wrong in looking, the step is kept
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

    def gradients(self, batch: Any) -> Tensor:
        """Forward and backward of every micro-batch: the sum of this rank's losses, fp64 [], on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in range(self.accumulation):
            micro = batch.part(index * self.micro, self.micro)
            with precision(self.engine, self.device):
                losses = self.program.objective(self.backend.model, micro)
            total += losses.detach().sum(dtype=torch.float64)
            last = index == self.accumulation - 1
            self.backend.backward(losses, global_batch=self.global_batch, last=last)
        return total

    def update(self, total: Tensor, step: int, waited_s: float) -> Taken:
        """Agree with the other ranks and update, without waiting for either. A bad loss updates nothing."""
        # A step that is read late leaves room for one more before the time limit.
        wish = self.stopper.wish(2 * self.checkpoints.stall_s + (self.step_s if self.late else 0.0))
        words = agree(total, wish, self.world)
        lr = learning_rate(self.optim, step, self.steps)
        grad_norm = self.backend.step(lr, words[0].isfinite())
        numbers = Later(torch.cat([words, grad_norm.to(words).view(1)]))
        return Taken(step, lr, waited_s, getattr(self.program.stream, "bad", 0), numbers)

    def is_due(self, step: int) -> bool:
        """Whether the step that was just taken must be read before anything else: someone looks at what came of it."""
        if not self.late or not self.begun or step % self.engine.checkpoint_every == 0:
            return True
        return self.looks.due(step)

    def hear(self) -> int:
        """Read the step that was taken last, if it is not read yet, and log it: the greatest wish of all ranks.

        No later update has been made then, so the average takes in the weights of that very step.
        """
        taken, self.taken = self.taken, None
        if taken is None:
            return stopping.GO_ON
        outcome = taken.read(self.world, self.global_batch)
        if outcome.what:
            self.bad_step(taken.step, outcome.what)
        self.begin(taken.step)
        if not outcome.what:
            self.ema.update(taken.step + 1)
            self.monitor.step(
                taken.step + 1,
                loss=outcome.loss,
                grad_norm=outcome.grad_norm,
                lr=taken.lr,
                waited_s=taken.waited_s,
                bad=taken.damaged,
            )
        return outcome.wish

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
        self.looks.held_out = saved.extra["held_out"]
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
        if self.engine.precision == "bf16" and emulates_bf16(self.device):
            self.monitor.note("this CPU has no products in bf16 (AVX-512 has): they are emulated, far slower than fp32")
        if step == 0:
            if self.program.look_first:
                self.looks.evaluate(0)
            return
        # An earlier start may have saved this step and ended before it had looked at it. Rank 0 knows.
        measures = self.program.held_out is not None and self.world.is_main
        if dist.broadcast_object(measures and not self.monitor.has_row(step, "held_out_loss"), self.world):
            self.looks.look(step)

    def save(self, step: int) -> None:
        extra = {"monitor": self.monitor.state(), "bad_steps": self.bad_steps, "held_out": self.looks.held_out}
        told = alike.check(self.program.model, self.world, self.engine, f"at step {step}")
        if told:
            self.monitor.note(told)
        self.checkpoints.save(step, self.backend, self.ema, extra)

    def stop(self, step: int) -> None:
        self.checkpoints.finish()
        reasons = dist.gather_objects(self.stopper.reason, self.world)
        reason = next((text for text in reasons if "another rank" not in text), reasons[0])
        raise ResumeLater(f"{reason}; saved at step {step} of {self.steps}, the same command continues")

    def fitted(self, step: int, seconds: float) -> Fitted:
        rows = self.monitor.rows if self.world.is_main else []
        last = next((row["loss"] for row in reversed(rows) if "loss" in row), math.nan)
        ema = self.ema.gather()
        losses = {"loss": last, **self.looks.held_out}
        return Fitted(self.looks.trained(), ema, step, losses, rows, seconds, self.world)


# --- helpers --------------------------------------------------------------------------------------------------------


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in trainable(model).items()}
