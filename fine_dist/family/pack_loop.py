"""The training loop of a pack; every job has its own learning rate, length, early stop and gradient clipping.

A job leaves the pack when it is done, has stopped improving, or has failed; the other jobs are not affected. The state
of all jobs is one small file, from which the same command continues after a kill.

Shapes: J jobs, B samples of a job on this process, F feeds.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist, replica_check
from fine_dist.engine.allocator import keep_freed_memory
from fine_dist.engine.compiling import compiles
from fine_dist.engine.optimizer import learning_rate, set_arithmetic
from fine_dist.engine.program import divide_batch, may_skip
from fine_dist.engine.settings import LoopConfig, OptimConfig
from fine_dist.engine.step_result import AsyncHostCopy
from fine_dist.engine.stopping import GO_ON, STOP
from fine_dist.engine.world import World
from fine_dist.family.index_cache import to_device
from fine_dist.family.pack_feed import Feeds, FeedSource
from fine_dist.family.pack_gradients import PackGradients
from fine_dist.family.pack_job import JobProgress, JobState, PackJob, PackObserver
from fine_dist.family.pack_model import PackedDiT
from fine_dist.family.pack_optim import PackedAdamW
from fine_dist.family.pack_state import read_states, write_states
from fine_dist.family.packing import EarlyStop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingPackStep:
    """A step whose update is queued on the device and whose results the host has not read."""

    jobs: list[int]
    """Jobs of this step."""
    rates: dict[int, float]
    numbers: AsyncHostCopy
    """Losses [J], gradient norms [J], flags of lost feeds [F], stop requests of all ranks [W]."""


class PackRun:
    """The training of one pack.

    As in the engine's loop, the host never waits for a step: a mask on the device decides which jobs are updated, and
    on a GPU the host reads the losses of a step while the next step runs.

    Args:
        pack: Parameters and forward pass of J jobs.
        jobs: The jobs in the pack's order; their steps, rates, seeds and data sets may differ.
        batch: Samples of one job in a step, over all processes.
        optim: Settings of AdamW and the schedule; each job has its own learning rate.
        diffusion: The diffusion process of the jobs.
        engine: Settings of the loop.
        observer: Receives the events of the jobs, on rank 0.
        world: Rank, world size and device of this process.
        chunk: Jobs that go through the model at once; fewer take less memory, more are faster on small batches.
        stop: Rule that ends jobs early. None: no early stop.
        states: Folder of the states of all packs, and this pack's name in it. None: nothing is saved.
        stop_request: Called before every update with the seconds that a step and a save take; returns a request of
            `engine.stopping`.
    """

    def __init__(
        self,
        pack: PackedDiT,
        jobs: Sequence[PackJob],
        *,
        batch: int,
        optim: OptimConfig,
        diffusion: DiffusionConfig,
        engine: LoopConfig,
        observer: PackObserver,
        world: World,
        chunk: int | None = None,
        stop: EarlyStop | None = None,
        states: tuple[Path, str] | None = None,
        stop_request: Callable[[float], int] = lambda seconds: GO_ON,
    ) -> None:
        self.pack, self.jobs, self.world, self.engine = pack, list(jobs), world, engine
        self.batch, self.diffusion, self.early = batch, diffusion, stop
        self.device = world.device or torch.device("cpu")
        self.optim = [optim.model_copy(update={"lr": job.lr}) for job in jobs]
        self.optimizer = PackedAdamW(pack.trained(), len(self.jobs), optim)
        self.observer, self.states, self.stop_request = observer, states, stop_request
        micro_batch, _ = divide_batch(batch, engine.micro_batch, world.world_size)
        self.gradients = PackGradients(
            pack, self.optimizer.zero_grad, diffusion, engine, self.device, chunk or len(self.jobs), micro_batch
        )
        self.progress = [JobProgress() for _ in self.jobs]
        self.reads_late = self.device.type != "cpu"
        """Whether the results of a step are read during the next step. On a CPU a step ends when its calls return."""
        self.pending: PendingPackStep | None = None
        self._save_s = 0.0
        self._first_step = True
        self._read_at = time.perf_counter()
        """Time at which the results of the last step were read; the seconds of a step are counted from there."""
        if engine.keep_freed_memory and self.device.type == "cpu":
            keep_freed_memory()
        set_arithmetic(engine)
        if compiles(engine, self.device):
            pack.compile_block()
        # Before resuming: every rank starts from rank 0's bits, and the state on disk replaces the same rows on all.
        self._broadcast_start()
        self._resume()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train all jobs. False when a stop was requested before their end; their state is saved then."""
        for _ in self.steps():
            pass
        return not self.active()

    def steps(self) -> Iterator[int]:
        """Train step by step: yields the number of steps so far, until no job is left or a stop was requested."""
        feeds, feed_of = self._feeds()
        taken, step_s = 0, 0.0
        for j in self.active():
            # Evaluated before the first step only; a resumed job has that row in its log.
            if self.progress[j].step == 0:
                self._evaluate(j)
        self._read_at = time.perf_counter()
        try:
            while active := self.active():
                begun = time.perf_counter()
                batch = feeds.next([feed_of[j] for j in active])
                losses = self.gradients(batch, {j: feed_of[j] for j in active})
                request = self._read_pending(feeds, feed_of)  # the previous step, while the device computes this one
                # On a GPU one more step is already queued when a stop request is read.
                step_s_needed = 2 * step_s if self.reads_late else step_s
                self.pending = self._update(losses, active, feeds, step_s_needed + self._save_s)
                taken += 1
                if request or self._must_read(taken):
                    request = max(request, self._read_pending(feeds, feed_of))
                step_s = time.perf_counter() - begun
                if self.world.is_main:
                    self.observer.after_step(self.progress)
                if taken % self.engine.checkpoint_every == 0 or request:
                    self.save()
                yield taken
                if request == STOP:
                    return
        finally:
            feeds.close()

    def active(self) -> list[int]:
        """Jobs that still train, deepest first."""
        running = [j for j, p in enumerate(self.progress) if p.state == "running"]
        return sorted(running, key=lambda j: -self.pack.depths[j])

    def _update(self, losses: Tensor, jobs: list[int], feeds: Feeds, seconds: float) -> PendingPackStep:
        """Reduce gradients, losses and stop requests over ranks, and queue the update; the host does not wait.

        A job is updated if its loss and its gradient norm are finite; a mask on the device decides that.
        """
        ranks = self.world.world_size
        # One message with the losses: all ranks must learn of lost feeds and stop requests in the same step.
        flags = torch.zeros(len(feeds.sources) + ranks)
        flags[list(feeds.bad)] = 1.0
        flags[len(feeds.sources) + self.world.rank] = float(self.stop_request(seconds))
        # Divided first, so that the sum over ranks is the mean.
        numbers = torch.cat([losses / ranks, to_device(flags, self.device)])
        if ranks > 1:
            dist.all_reduce_sum(numbers, self.world)
            for p in self.optimizer.parameters:
                # A rank that lost all its feeds has no gradient, but must take part in the collective.
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce_sum(p.grad, self.world).div_(ranks)
        running = [j for j in jobs if self.progress[j].state == "running"]
        rates = {j: learning_rate(self.optim[j], self._taken(j), self.jobs[j].steps) for j in running}
        norms = self.optimizer.norms()
        # One row for every job, also ended ones: shapes stay fixed, so no kernel is chosen or compiled again.
        table = to_device(
            torch.tensor([[float(j in rates), rates.get(j, 0.0)] for j in range(len(self.jobs))], dtype=torch.float64),
            self.device,
        )
        mean = numbers[: len(self.jobs)]
        # Computed on the device; the host reads the losses and norms one step later.
        update = (table[:, 0] > 0) & mean.isfinite() & norms.isfinite()
        self.optimizer.step(update, table[:, 1])
        copied = AsyncHostCopy(torch.cat([mean, norms, numbers[len(self.jobs) :]]).double())
        return PendingPackStep(running, rates, copied)

    def _taken(self, j: int) -> int:
        """Number of steps of a job that are done or queued on the device."""
        # The pending step counts, because it is queued and cannot be undone.
        return self.progress[j].step + (self.pending is not None and j in self.pending.jobs)

    def _must_read(self, taken: int) -> bool:
        """Whether the results of the step must be read before the next step starts."""
        if not self.reads_late or self._first_step or taken % self.engine.checkpoint_every == 0:
            return True
        # The end of a job, an evaluation and an early stop need the weights as they are after this very step.
        steps = {(j, self._taken(j)) for j in self.active()}
        window = self.early.window if self.early else 0
        return any(
            step >= self.jobs[j].steps or step % self.engine.eval_every == 0 or (window and step % window == 0)
            for j, step in steps
        )

    def _read_pending(self, feeds: Feeds, feed_of: dict[int, int]) -> int:
        """Read the results of the pending step, if there is one; returns the strongest stop request of all ranks."""
        pending, self.pending = self.pending, None
        if pending is None:
            return GO_ON
        self._first_step = False
        values, count = pending.numbers.read(), len(self.jobs)
        losses, norms, rest = values[:count], values[count : 2 * count], values[2 * count :]
        lost, requests = rest[: len(feeds.sources)], rest[len(feeds.sources) :]
        for feed, flag in enumerate(lost):
            if flag >= 1:
                # Some rank set the flag: all ranks end the jobs of this feed in the same step.
                feeds.bad.setdefault(feed, "another process could not read its data")
        now = time.perf_counter()
        seconds, self._read_at = now - self._read_at, now
        # At one width the time of a job is proportional to its depth.
        layers = sum(self.pack.depths[j] for j in pending.jobs)
        for j in sorted(pending.jobs):
            if feed_of[j] in feeds.bad:
                self._end(j, "failed", feeds.bad[feed_of[j]])
            elif math.isfinite(losses[j]) and math.isfinite(norms[j]):
                self.progress[j].seconds += seconds * self.pack.depths[j] / layers
                self._count(j, losses[j], norms[j], pending.rates[j])
            else:
                self._bad_step(j, losses[j], norms[j])
        return int(max(requests))

    # --- feeds ------------------------------------------------------------------------------------------------------

    def _feeds(self) -> tuple[Feeds, dict[int, int]]:
        """Feeds of the active jobs, and the feed of each job."""
        sources: list[FeedSource] = []
        feed_of: dict[int, int] = {}
        for j in self.active():
            job = self.jobs[j]
            source = FeedSource(job.domain, job.data, job.seed, self.progress[j].step, job.num_classes)
            # Compared by value: jobs that differ only in learning rate or depth share samples and noise.
            if source not in sources:
                sources.append(source)
            feed_of[j] = sources.index(source)
        return Feeds(sources, self.pack.arch, self.batch, self.diffusion, self.world), feed_of

    # --- progress of a job ------------------------------------------------------------------------------------------

    def _count(self, j: int, loss: float, norm: float, rate: float) -> None:
        job, progress = self.jobs[j], self.progress[j]
        progress.step += 1
        progress.window.append(loss)
        done = progress.step == job.steps
        stopped = progress.stopped_improving(loss, self.early)
        if progress.step % self.engine.log_every == 0 or done or stopped:
            values = {"loss": sum(progress.window) / len(progress.window), "lr": rate, "grad_norm": norm}
            if self.world.is_main:
                self.observer.row(j, progress.step, values)
            progress.window = []
        if progress.step % self.engine.eval_every == 0 and not (done or stopped):
            self._evaluate(j)
        if done or stopped:
            self._end(j, "done", f"stopped improving at step {progress.step}" if stopped and not done else None)

    def _bad_step(self, j: int, loss: float, norm: float) -> None:
        """End the job, or count the step without an update, depending on `engine.on_bad_loss`."""
        progress = self.progress[j]
        if j in self.gradients.too_large or not may_skip(self.engine, progress.bad_steps):
            self._end(j, "failed", self._why_bad(j, loss, norm))
            return
        progress.bad_steps += 1
        progress.step += 1
        if progress.step == self.jobs[j].steps:
            self._end(j, "done")

    def _why_bad(self, j: int, loss: float, norm: float) -> str:
        if j in self.gradients.too_large:
            return f"out of memory with one job of depth {self.pack.depths[j]} and batch {self.batch}; lower batch"
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        skipped = self.progress[j].bad_steps
        after = f", after {skipped} skipped steps (engine.max_bad_steps)" if skipped else ""
        return f"step {self.progress[j].step + 1}: the {what}{after}; lower its learning rate ({self.jobs[j].lr:g})"

    def _evaluate(self, j: int) -> None:
        if self.world.is_main:
            self.observer.evaluate(j, self.progress[j].step)

    def _end(self, j: int, state: JobState, reason: str | None = None) -> None:
        self.progress[j].state, self.progress[j].reason = state, reason
        if self.world.is_main:
            self.observer.ended(j, self.progress[j])

    # --- the state on disk ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of all jobs as one file, atomically. No step may be pending."""
        if self.states is None:
            return
        drift = replica_check.check(self.pack, self.world, self.engine, "at a checkpoint")
        if not self.world.is_main:
            return
        if drift:
            log.warning("%s", drift)
        begun = time.perf_counter()
        folder, name = self.states
        # Besides copying the states this is the only wait of a save; no step is pending, so it is short.
        updates = self.optimizer.updates.tolist()
        states = {
            job.name: (job.key, self.optimizer.state(j), {**asdict(p), "updates": int(updates[j])})
            for j, (job, p) in enumerate(zip(self.jobs, self.progress))
        }
        write_states(folder, name, states)
        self._save_s = time.perf_counter() - begun

    @torch.no_grad()
    def _broadcast_start(self) -> None:
        """Send rank 0's initial values to all ranks, because different processor models round differently."""
        if self.world.world_size == 1:
            return
        replica_check.broadcast(self.pack, self.world)
        for j in range(len(self.jobs)):
            fixed = self.pack.fixed(j)
            flat = dist.broadcast(torch.cat([bias.detach().flatten() for bias in fixed]), self.world)
            for bias, values in zip(fixed, flat.split([bias.numel() for bias in fixed])):
                bias.copy_(values.view_as(bias))

    def _resume(self) -> None:
        """Restore the furthest saved state of every job, from any pack's file."""
        if self.states is None:
            return
        saved = read_states(*self.states, {job.name: job.key for job in self.jobs})
        for j, job in enumerate(self.jobs):
            if job.name not in saved:
                continue
            tensors, values = saved[job.name]
            self.optimizer.restore(j, tensors, values.pop("updates"))
            self.progress[j] = JobProgress(**values)
            # A failed job is tried again. A job that was done ends again, because its result is missing.
            self.progress[j].state = "running"
            if self.progress[j].step >= job.steps:
                self._end(j, "done")
