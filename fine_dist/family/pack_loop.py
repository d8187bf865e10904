"""The loop over a pack: one program, and for every job its own rate, length, early stop, clipping and end.

A job leaves the pack when it is done, has stopped improving, or has failed; the others never notice. The state of all
jobs is one small file, so killing the process and starting the same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fine_dist.core.errors import ConfigError
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist, replica_check
from fine_dist.engine.allocator import keep_freed_memory
from fine_dist.engine.dist import World
from fine_dist.engine.optimizer import learning_rate, precision
from fine_dist.engine.settings import LoopConfig, OptimConfig
from fine_dist.engine.stopping import GO_ON, STOP
from fine_dist.family.pack_feed import Fed, Feeds, Source
from fine_dist.family.pack_model import Inputs, PackedDiT
from fine_dist.family.pack_optim import PackedAdamW
from fine_dist.family.pack_state import read_states, write_states
from fine_dist.family.packing import EarlyStop

log = logging.getLogger(__name__)

State = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class PackJob:
    """One job of a pack. `seed` orders its data and draws its noise; `domain` names its data set."""

    name: str
    key: str
    """Hash of everything that decides its trajectory: a saved state with another key is another job's."""
    domain: str
    data: DataConfig
    num_classes: int
    seed: int
    lr: float
    steps: int


@dataclass
class Progress:
    """What became of a job so far: part of a checkpoint."""

    step: int = 0
    state: State = "running"
    reason: str | None = None
    seconds: float = 0.0
    """This job's share of the wall time: a step's seconds are shared out by depth."""
    window: list[float] = field(default_factory=list)
    """Losses since the last row."""
    recent: list[float] = field(default_factory=list)
    """Losses that an early stop still looks at."""
    bad_steps: int = 0
    """Steps that were skipped because a loss or gradient was not finite."""


class Watcher(Protocol):
    """Who is told, on rank 0 only. A job is named by its index."""

    def row(self, job: int, step: int, values: dict[str, float]) -> None:
        """A mean over the steps since the last row."""

    def look(self, job: int, step: int) -> None:
        """A moment to measure the job: before its first step, then every `engine.eval_every` steps."""

    def ended(self, job: int, progress: Progress) -> None:
        """The job is done or has failed."""

    def tick(self, progress: Sequence[Progress]) -> None:
        """After every step of the pack."""


class PackRun:
    """The training of one pack.

    pack:       J jobs' parameters and forward pass.
    jobs:       in the pack's order; their steps, rates, seeds and data sets may differ.
    batch:      samples of one job in a step, over all processes.
    chunk:      jobs that go through the model at once; fewer cost less memory, more cost less time on small batches.
    states:     folder of all packs' states, and this pack's name in it; none keeps nothing.
    wish:       asked before every step with the seconds that a step and a save take: go on, save, or save and return.
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
        watcher: Watcher,
        world: World,
        chunk: int | None = None,
        stop: EarlyStop | None = None,
        states: tuple[Path, str] | None = None,
        wish: Callable[[float], int] = lambda seconds: GO_ON,
    ) -> None:
        self.pack, self.jobs, self.world, self.engine = pack, list(jobs), world, engine
        self.batch, self.diffusion, self.early = batch, diffusion, stop
        self.optim = [optim.model_copy(update={"lr": job.lr}) for job in jobs]
        self.optimizer = PackedAdamW(pack.trained(), len(self.jobs), optim)
        self.chunk = chunk or len(self.jobs)
        self.watcher, self.states, self.wish = watcher, states, wish
        self.micro = micro_batch(batch // world.world_size, engine.micro_batch)
        self.progress = [Progress() for _ in self.jobs]
        self._objective = Objective(diffusion, pack.arch, 0)
        self._objective.process.to(world.device or "cpu")
        self._save_s = 0.0
        self._no_memory: set[int] = set()
        if engine.keep_freed_memory and (world.device is None or world.device.type == "cpu"):
            keep_freed_memory()
        self._send()
        self._resume()

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Train every job to its end. False when a wish to stop came first; the state is saved then."""
        for _ in self.steps():
            pass
        return not self.active()

    def steps(self) -> Iterator[int]:
        """Train step by step: yields how many steps of the pack were taken, until no job is left or a wish came."""
        feeds, feed_of = self._feeds()
        taken, step_s = 0, 0.0
        for j in self.active():
            if self.progress[j].step == 0:
                self._look(j)
        try:
            while active := self.active():
                begun = time.perf_counter()
                fed = feeds.next([feed_of[j] for j in active])
                wish = self._agree(feeds, 2 * step_s + self._save_s)
                for j in active:
                    if feed_of[j] in feeds.bad:
                        self._end(j, "failed", feeds.bad[feed_of[j]])
                active = self.active()
                if fed is not None and active:
                    self._step(fed, {j: fed.rows[feed_of[j]] for j in active}, begun)
                taken, step_s = taken + 1, time.perf_counter() - begun
                if self.world.is_main:
                    self.watcher.tick(self.progress)
                if taken % self.engine.checkpoint_every == 0 or wish:
                    self.save()
                yield taken
                if wish == STOP:
                    return
        finally:
            feeds.close()

    def active(self) -> list[int]:
        """Jobs that still train, deepest first."""
        running = [j for j, p in enumerate(self.progress) if p.state == "running"]
        return sorted(running, key=lambda j: -self.pack.depths[j])

    def _step(self, fed: Fed, row: dict[int, int], begun: float) -> None:
        active = self.active()
        losses = self._reduce(self._gradients(fed, row, active))
        loss, norm = torch.stack([losses, self.optimizer.norms()]).tolist()
        good = sorted(j for j in active if math.isfinite(loss[j]) and math.isfinite(norm[j]))
        for j in sorted(set(active) - set(good)):
            self._bad_step(j, loss[j], norm[j])
        rates = [learning_rate(self.optim[j], self.progress[j].step, self.jobs[j].steps) for j in good]
        if good:
            self.optimizer.step(good, rates)
        seconds = time.perf_counter() - begun
        layers = sum(self.pack.depths[j] for j in active)
        for j, rate in zip(good, rates):
            self.progress[j].seconds += seconds * self.pack.depths[j] / layers
            self._count(j, loss[j], norm[j], rate)

    def _bad_step(self, j: int, loss: float, norm: float) -> None:
        """End the job, or count the step as taken without an update, as `engine.on_bad_loss` says."""
        progress, engine = self.progress[j], self.engine
        if engine.on_bad_loss == "stop" or j in self._no_memory or progress.bad_steps >= engine.max_bad_steps:
            self._end(j, "failed", self._why_bad(j, loss, norm))
            return
        progress.bad_steps += 1
        progress.step += 1
        if progress.step == self.jobs[j].steps:
            self._end(j, "done")

    def _why_bad(self, j: int, loss: float, norm: float) -> str:
        if j in self._no_memory:
            return f"out of memory with one job of depth {self.pack.depths[j]} and batch {self.batch}; lower batch"
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        skipped = self.progress[j].bad_steps
        after = f", after {skipped} skipped steps (engine.max_bad_steps)" if skipped else ""
        return f"step {self.progress[j].step + 1}: the {what}{after}; lower its learning rate ({self.jobs[j].lr:g})"

    def _gradients(self, fed: Fed, row: dict[int, int], active: list[int]) -> Tensor:
        """Losses [J] of the active jobs, and their gradients, some jobs at a time.

        A job whose batch does not fit even alone has the loss NaN: every process then ends it in the same step.
        """
        while True:
            self.optimizer.zero_grad()
            losses = torch.zeros(len(self.jobs), device=fed.question.z.device)
            losses[sorted(self._no_memory)] = math.nan
            fits = [j for j in active if j not in self._no_memory]
            # Chunks of nearly equal size: a last small one would cost as many calls as a full one.
            size = math.ceil(len(fits) / math.ceil(len(fits) / self.chunk)) if fits else 1
            part: list[int] = []
            try:
                for start in range(0, len(fits), size):
                    part = fits[start : start + size]
                    losses[part] = self._backward(fed, [row[j] for j in part], part)
                return losses
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if len(part) == 1:
                self._no_memory.add(part[0])
            self.chunk = max(1, len(part) // 2)
            if fed.question.z.is_cuda:
                torch.cuda.empty_cache()

    def _backward(self, fed: Fed, rows: list[int], jobs: list[int]) -> Tensor:
        """Mean losses [J'] of some jobs and their gradients, a micro-batch of each at a time."""
        total = torch.zeros(len(jobs), device=fed.question.z.device)
        samples = fed.question.t.shape[1]
        for start in range(0, samples, self.micro):
            part = slice(start, start + self.micro)
            inputs = Inputs(*(x[:, part] for x in (fed.inputs.z, fed.inputs.t, fed.inputs.y)))
            with precision(self.engine, fed.question.z.device):
                out = self.pack(inputs, rows, jobs)  #                                      [J', b, C or 2C, H, H]
            losses = self._objective.losses(fed.of(rows, part), out.flatten(0, 1)).unflatten(0, (len(jobs), -1))
            means = losses.mean(1) if self.micro == samples else losses.sum(1) / samples  #                        [J']
            means.sum().backward()
            total += means.detach()
        return total

    def _reduce(self, losses: Tensor) -> Tensor:
        """Means over processes: each has an equal share of every job's batch. Gradients are sigma's alone."""
        if self.world.world_size > 1:
            for p in self.optimizer.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce_sum(p.grad, self.world).div_(self.world.world_size)
            dist.all_reduce_sum(losses, self.world).div_(self.world.world_size)
        return losses

    def _agree(self, feeds: Feeds, seconds: float) -> int:
        """The greatest wish of all processes; a feed that one of them lost is lost for all."""
        words = torch.zeros(1 + len(feeds.sources))
        words[0] = float(self.wish(seconds))
        words[[1 + feed for feed in feeds.bad]] = 1.0
        dist.all_reduce_max(words, self.world)
        for feed in words[1:].nonzero().flatten().tolist():
            feeds.bad.setdefault(feed, "another process could not read its data")
        return int(words[0])

    def _feeds(self) -> tuple[Feeds, dict[int, int]]:
        """Feeds of the active jobs, and which of them each job sees."""
        sources: list[Source] = []
        feed_of: dict[int, int] = {}
        for j in self.active():
            job = self.jobs[j]
            source = Source(job.domain, job.data, job.seed, self.progress[j].step, job.num_classes)
            if source not in sources:
                sources.append(source)
            feed_of[j] = sources.index(source)
        return Feeds(sources, self.pack.arch, self.batch, self.diffusion, self.world), feed_of

    # --- a job's own progress ---------------------------------------------------------------------------------------

    def _count(self, j: int, loss: float, norm: float, rate: float) -> None:
        job, progress = self.jobs[j], self.progress[j]
        progress.step += 1
        progress.window.append(loss)
        done = progress.step == job.steps
        stopped = self._flat(progress, loss)
        if progress.step % self.engine.log_every == 0 or done or stopped:
            mean = sum(progress.window) / len(progress.window)
            values = {"loss": mean, "lr": rate, "grad_norm": norm}
            if self.world.is_main:
                self.watcher.row(j, progress.step, values)
            progress.window = []
        if progress.step % self.engine.eval_every == 0 and not (done or stopped):
            self._look(j)
        if done or stopped:
            self._end(j, "done", f"stopped improving at step {progress.step}" if stopped and not done else None)

    def _flat(self, progress: Progress, loss: float) -> bool:
        if self.early is None:
            return False
        size, recent = self.early.window, progress.recent
        recent.append(loss)
        del recent[: -2 * size]
        if len(recent) < 2 * size or progress.step % size:
            return False
        return sum(recent[size:]) > sum(recent[:size]) * (1 - self.early.min_gain)

    def _look(self, j: int) -> None:
        if self.world.is_main:
            self.watcher.look(j, self.progress[j].step)

    def _end(self, j: int, state: State, reason: str | None = None) -> None:
        self.progress[j].state, self.progress[j].reason = state, reason
        if self.world.is_main:
            self.watcher.ended(j, self.progress[j])

    # --- the state on disk ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state of all jobs as one file, whole or not at all."""
        if self.states is None:
            return
        told = replica_check.check(self.pack, self.world, self.engine, "at a checkpoint")
        if not self.world.is_main:
            return
        if told:
            log.warning(told)
        begun = time.perf_counter()
        folder, name = self.states
        states = {
            job.name: (job.key, self.optimizer.state(j), {**asdict(p), "updates": self.optimizer.updates[j]})
            for j, (job, p) in enumerate(zip(self.jobs, self.progress))
        }
        write_states(folder, name, states)
        self._save_s = time.perf_counter() - begun

    @torch.no_grad()
    def _send(self) -> None:
        """Rank 0's beginning for every rank: processors of different kinds round differently."""
        if self.world.world_size == 1:
            return
        replica_check.broadcast(self.pack, self.world)
        for j in range(len(self.jobs)):
            fixed = self.pack.fixed(j)
            flat = dist.broadcast(torch.cat([bias.detach().flatten() for bias in fixed]), self.world)
            for bias, theirs in zip(fixed, flat.split([bias.numel() for bias in fixed])):
                bias.copy_(theirs.view_as(bias))

    def _resume(self) -> None:
        """Go on from the furthest saved state of every job, in whichever pack it was saved."""
        if self.states is None:
            return
        found = read_states(self.states[0], {job.name: job.key for job in self.jobs})
        for j, job in enumerate(self.jobs):
            if job.name not in found:
                continue
            tensors, values = found[job.name]
            self.optimizer.restore(j, tensors, values.pop("updates"))
            self.progress[j] = Progress(**values)
            # One that failed is tried again, and one that was done is ended again: its result is not there.
            self.progress[j].state = "running"
            if self.progress[j].step >= job.steps:
                self._end(j, "done")


def micro_batch(samples: int, wanted: int | None) -> int:
    """Samples of a job that go through at once. `ConfigError` when they do not divide those a process has."""
    micro = wanted or samples
    if samples % micro:
        legal = [n for n in range(1, samples + 1) if samples % n == 0]
        raise ConfigError(
            f"engine.micro_batch: {micro} does not divide the {samples} samples of a target that a process has; "
            f"legal: {', '.join(map(str, legal))}"
        )
    return micro


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or accelerator memory is used up."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(w in str(error) for w in words)
