"""The training loop, which is the same for every method, backend and world size.

All random numbers are functions of (seed, step, position in the global batch), so that neither the number of processes
nor a restart changes the result. Running the same command again resumes from the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import ConfigError, ReportedElsewhere, ResumeLater, TrainingError
from fine_dist.core.seeds import mix
from fine_dist.engine import dist, replica_check, stopping
from fine_dist.engine.accelerators import emulates_bf16, known_peak
from fine_dist.engine.allocator import keep_freed_memory
from fine_dist.engine.backend import Backend
from fine_dist.engine.backends import make_backend
from fine_dist.engine.callbacks import EvaluationCallback, evaluation_model
from fine_dist.engine.checkpoint import Checkpoints, restore_ema
from fine_dist.engine.compiling import prepare_model
from fine_dist.engine.ema import Ema
from fine_dist.engine.monitor import Monitor
from fine_dist.engine.optimizer import learning_rate, precision, set_arithmetic, trainable
from fine_dist.engine.program import FitResult, Program, divide_batch, explain_stop, may_skip
from fine_dist.engine.run_dir import RunDir
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.step_result import AsyncHostCopy, PendingStep, reduce_flags
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.trackers import check_installed
from fine_dist.engine.world import World

_BEFORE_STEP = 0x6265666F7265
"""Constant that separates the random numbers of `before_step` from other uses of (seed, step)."""


class Run:
    """One start of a run: its components, and the loop over steps. The arguments are those of `fit`."""

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
        finished: Callable[[FitResult], None] = lambda result: None,
    ) -> None:
        self.program, self.steps, self.global_batch = program, steps, global_batch
        self.optim, self.engine, self.world, self.stopper = optim, engine, world, stopper
        self.seed, self.step_generator = seed, torch.Generator()
        self.device = world.device or torch.device("cpu")
        self.micro_batch, self.accumulation = divide_batch(global_batch, engine.micro_batch, world.world_size)
        check_installed(engine.tracker)
        if engine.threads:
            torch.set_num_threads(engine.threads)
        if engine.keep_freed_memory and self.device.type == "cpu":
            keep_freed_memory()
        set_arithmetic(engine)
        # The order matters from here on. The copy for evaluation is made of the untouched model; blocks are compiled
        # before a backend wraps them; and weights are made equal before the backend copies them into its fp32 masters.
        second_model = evaluation_model(program, engine, world)
        prepare_model(program.model, engine, self.device)
        replica_check.broadcast(program.model.to(self.device), world)  # on the device: over NCCL
        shapes = {name: list(p.shape) for name, p in trainable(program.model).items()}
        identity = {**program.identity, "seed": seed, "global_batch": global_batch, "trains": shapes}
        self.backend: Backend = make_backend(program.model, optim, engine, world, self.micro_batch, self.accumulation)
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
            peak=known_peak(self.device, engine) if world.is_main else None,
            log_every=engine.log_every,
            trackers=engine.tracker,
        )
        self.evaluation = EvaluationCallback(
            second_model, program, engine, steps, self.device, self.backend, self.ema, self.monitor, stopper
        )
        # On a GPU the host runs ahead of the device; reading a number would make it wait for the whole queue.
        self.reads_late = self.device.type != "cpu"
        """Whether the numbers of a step are read during the next step. On a CPU a step is complete when its calls
        return."""
        self.pending: PendingStep | None = None
        """The last step, unless its numbers have been read."""
        self.step_s = 0.0
        self.logs_open, self.claim, self.finished = False, claim, finished
        self.unfinished_row: dict[str, Any] | None = None
        """Metric sums of the row that an earlier start left unfinished."""
        self.bad_steps = 0
        self.begun, self.seconds_before = time.perf_counter(), 0.0
        """Time at which this start began to train, and seconds of training in earlier starts."""

    def train(self) -> FitResult:
        step = self.resume()
        self.begun = time.perf_counter()
        # After resuming, so that a checkpoint which one node has read wrongly is detected before training.
        replica_check.check(self.program.model, self.world, self.engine, "at the start")
        batches = self.program.stream.batches(step)
        while step < self.steps:
            started = time.perf_counter()
            batch, waited_s = self.next_batch(batches)
            if self.program.before_step is not None:
                # Seeded for each step: a generator with state would give a resumed run other numbers.
                seed = mix(self.seed, step, _BEFORE_STEP)
                self.program.before_step(step, self.step_generator.manual_seed(seed))
            total = self.gradients(batch)
            request = self.read_pending_step()  # of the previous step, while the device computes these gradients
            self.pending = self.update(total, step, waited_s)
            self.step_s = time.perf_counter() - started
            step += 1
            if request or self.must_read(step):
                # The request of the previous step counts as well: `SAVE` is reported
                # once, and it may have been read at the top of this step.
                request = max(request, self.read_pending_step())
            if step % self.engine.checkpoint_every == 0 or step == self.steps or request:
                self.save(step)
            self.evaluation.after_step(step, self.seconds)  # after the save: an error in it does not lose the step
            # Every rank has read the same reduced request, so that all ranks leave the
            # loop at the same step and no rank waits in a collective.
            if request == stopping.STOP and step < self.steps:
                self.stop(step)
            self.checkpoints.check()
        self.checkpoints.finish()
        # The last checkpoint is on disk before the result is computed, so
        # that everything that fails later can be repeated from it.
        result = self.result(step)
        self.finished(result)
        self.monitor.finish(step, self.program.hparams, result.losses)
        self.evaluation.preview(step, self.seconds)
        return result

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training so far, over all starts."""
        return self.seconds_before + time.perf_counter() - self.begun

    # --- the parts of a step ----------------------------------------------------------------------------------------

    def next_batch(self, batches: Iterator[Any]) -> tuple[Any, float]:
        """This rank's part of the next global batch on its device, and the seconds spent waiting for it."""
        begun = time.perf_counter()
        batch = next(batches)
        waited_s = time.perf_counter() - begun
        # A stream for another world size would train on too few or on repeated samples without an error.
        if len(batch) != self.micro_batch * self.accumulation:
            raise ConfigError(
                f"the stream gave rank {self.world.rank} {len(batch)} samples where {self.micro_batch} x "
                f"{self.accumulation} are due; make it with the same global batch, rank and world size"
            )
        return batch.to(self.device), waited_s

    def gradients(self, batch: Any) -> Tensor:
        """Run forward and backward passes of all micro-batches; returns the sum of this rank's losses, fp64 [] on the
        device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self.backend.computing():
            for index in range(self.accumulation):
                micro_batch = batch.part(index * self.micro_batch, self.micro_batch)
                with precision(self.engine, self.device):
                    losses = self.program.objective(self.backend.model, micro_batch)
                # In fp64, so that the sum does not depend on micro-batches and ranks in the logged digits.
                total += losses.detach().sum(dtype=torch.float64)
                # Gradients of earlier micro-batches are summed locally; ranks communicate once per step.
                last = index == self.accumulation - 1
                self.backend.backward(losses, global_batch=self.global_batch, last=last)
        return total

    def update(self, total: Tensor, step: int, waited_s: float) -> PendingStep:
        """Reduce losses and stop requests over ranks and queue the update, without waiting for the device.

        A loss that is not finite updates nothing, which is decided on the device.

        Args:
            total: Sum of this rank's losses, fp64 [], on the device.
            step: Updates before this one.
            waited_s: Seconds that this rank waited for data.
        """
        # If numbers are read late, one more step runs before a stop takes effect. Twice the last
        # save, because its duration varies with the load of the file system.
        seconds_needed = 2 * self.checkpoints.stall_s + (self.step_s if self.reads_late else 0.0)
        terms = self.program.take_terms() if self.program.take_terms is not None else None
        # One message for everything that ranks must agree on. It is queued before the update, whose `good` flag is a
        # value on the device: a bad loss on any rank cancels the update on all ranks before the host knows of it.
        flags = reduce_flags(total, self.stopper.stop_request(seconds_needed), self.world, terms)
        lr = learning_rate(self.optim, step, self.steps)
        grad_norm = self.backend.step(lr, flags[0].isfinite())
        # All numbers of the step are in one tensor, so that one copy and one event suffice.
        numbers = AsyncHostCopy(torch.cat([flags, grad_norm.to(flags).view(1)]))
        return PendingStep(step, lr, waited_s, getattr(self.program.stream, "bad", 0), numbers)

    def must_read(self, step: int) -> bool:
        """Whether the last step's numbers must be read before the next step starts."""
        # The first step is always read at once, because the run
        # may write into its directory only once a step has worked.
        if not self.reads_late or not self.logs_open or step % self.engine.checkpoint_every == 0:
            return True
        return self.evaluation.is_due(step)

    def read_pending_step(self) -> int:
        """Read and log the last step's numbers, unless they have been read; returns the strongest stop request.

        It is called before the next update is queued, so that the EMA averages the weights of this step.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return stopping.GO_ON
        result = pending.read(self.world, self.global_batch)
        if result.problem:
            self.bad_step(pending.step, result.problem)
        self.open_logs(pending.step)
        if not result.problem:
            # After the step is known to be good, because an EMA with a NaN would keep it forever.
            self.ema.update(pending.step + 1)
            self.monitor.step(
                pending.step + 1,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=pending.lr,
                waited_s=pending.waited_s,
                damaged=pending.damaged,
                terms=dict(zip(self.program.term_names, result.terms)),
            )
        return result.stop_request

    def bad_step(self, step: int, problem: str) -> None:
        """Stop the run, or count the step and continue, according to `engine.on_bad_loss`."""
        self.monitor.skipped()
        where = f"step {step + 1}: {problem}"
        if may_skip(self.engine, self.bad_steps):
            self.bad_steps += 1
            most = self.engine.max_bad_steps
            self.monitor.warn(f"{where}; the step is skipped ({self.bad_steps} of at most {most})")
            return
        why = f"{where}; {explain_stop(self.engine, self.bad_steps)}"
        # All ranks have read the same numbers, so that all of them raise here, and rank 0 reports the error.
        raise TrainingError(why) if self.world.is_main else ReportedElsewhere(why)

    # --- between steps ----------------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; returns the number of updates that are done."""
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return 0
        if checkpoint.step > self.steps:
            raise ConfigError(
                f"the checkpoint {checkpoint.folder} is at step {checkpoint.step}, beyond the {self.steps} asked for"
            )
        self.backend.load(checkpoint)
        restore_ema(checkpoint, self.ema, self.backend.pieces())
        self.bad_steps, self.seconds_before = checkpoint.extra["bad_steps"], checkpoint.extra["seconds"]
        self.evaluation.held_out = checkpoint.extra["held_out"]
        self.unfinished_row = checkpoint.extra["monitor"]
        checkpoint.close()
        # No step will run, so the logs must be opened here.
        if checkpoint.step == self.steps:
            self.open_logs(checkpoint.step)
        step: int = checkpoint.step
        return step

    def open_logs(self, step: int) -> None:
        """Open the logs, once, after the first step has worked; the run directory belongs to this run from then on."""
        if self.logs_open:
            return
        self.logs_open = True
        self.claim()
        self.monitor.start(step, self.unfinished_row)
        if self.engine.precision == "bf16" and emulates_bf16(self.device):
            self.monitor.warn("this CPU has no products in bf16 (AVX-512 has): they are emulated, far slower than fp32")
        if step == 0:
            if self.program.evaluate_first:
                self.evaluation.evaluate(0)
            return
        # An earlier start may have ended between the save and the evaluation of this step. Only rank 0 has the rows.
        measures = self.program.held_out is not None and self.world.is_main
        if dist.broadcast_object(measures and not self.monitor.has_row(step, "held_out_loss"), self.world):
            self.evaluation.after_step(step, self.seconds)

    def save(self, step: int) -> None:
        """Compare the ranks' weights and start to write a checkpoint."""
        extra = {
            "monitor": self.monitor.state(),
            "bad_steps": self.bad_steps,
            "held_out": self.evaluation.held_out,
            "seconds": self.seconds,
        }
        # Ranks are compared before every save, so that no checkpoint holds diverged weights.
        drift = replica_check.check(self.program.model, self.world, self.engine, f"at step {step}")
        if drift:
            self.monitor.warn(drift)
        self.checkpoints.save(step, self.backend, self.ema, extra)

    def stop(self, step: int) -> None:
        """Raise `ResumeLater` with the reason of the rank that asked for it."""
        self.checkpoints.finish()
        # A signal may reach only some ranks, and the user should read the reason of a rank that received it.
        reasons = dist.gather_objects(self.stopper.reason, self.world)
        reason = next((text for text in reasons if "another rank" not in text), reasons[0])
        raise ResumeLater(f"{reason}; saved at step {step} of {self.steps}, the same command continues")

    def result(self, step: int) -> FitResult:
        """The result that `fit` returns."""
        rows = self.monitor.rows if self.world.is_main else []
        last = next((row for row in reversed(rows) if "loss" in row), {"loss": math.nan})
        terms = {key: last[key] for name in self.program.term_names if (key := f"loss_{name}") in last}
        losses = {"loss": last["loss"], **terms, **self.evaluation.held_out}
        model = self.evaluation.trained_model()
        return FitResult(model, self.ema.gather(), step, losses, rows, self.seconds, self.world)
