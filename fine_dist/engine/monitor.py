"""Logs of a run that rank 0 writes while it trains: metrics.jsonl, its trackers and a progress bar.

Every number is a mean over the steps since the last row, and losses are means over the samples of *all* ranks. The sums
of an unfinished row are part of a checkpoint, so a resumed run writes the rows that an uninterrupted run writes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.regular_files import as_row, open_regular
from fine_dist.core.retry import retry
from fine_dist.engine.dist import all_reduce_max, all_reduce_sum
from fine_dist.engine.run_dir import CONFIG, METRICS, RunDir
from fine_dist.engine.trackers import TrackedRun, Trackers
from fine_dist.engine.world import World

log = logging.getLogger(__name__)


@dataclass
class MetricSums:
    """Sums over the steps since the last row."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    skipped: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    """The loss's terms by name, where there are several."""


class MetricsLog:
    """The numbers of one run: rows of metrics.jsonl, and the same in its trackers under `train/NAME`.

    Args:
        run: The run; rows after its step are cut off, and hidden in TensorBoard, so that no step shows twice.
        trackers: As `engine.tracker` gives them.
    """

    def __init__(self, run: TrackedRun, trackers: Sequence[str]) -> None:
        metrics = run.folder / METRICS
        # Rows behind the checkpoint describe updates that are lost and will be made again, perhaps with other numbers.
        self.rows = keep_rows(metrics, run.step)
        # Appended without a buffer: a row is on its way to the disk when it is written, a reader never sees half of
        # one unless the machine dies, and what failed is not in a buffer that the next row would flush once more.
        self._file = open(metrics, "ab", buffering=0)  # noqa: SIM115 - closed in `close`
        self.trackers = Trackers(run, trackers)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a row; numbers that are None are left out."""
        row = {"step": step, **{key: value for key, value in values.items() if value is not None}}
        line = (json.dumps({key: _json_number(value) for key, value in row.items()}) + "\n").encode()
        while line:
            # Shared file systems fail now and then for a moment, and a run of days should outlive that.
            line = line[retry(lambda: self._file.write(line)) :]  # noqa: B023 - it is called at once
        self.rows.append(row)
        self.trackers.scalars(step, {f"train/{key}": value for key, value in row.items() if key != "step"})

    def has(self, step: int, key: str) -> bool:
        """Whether there is a row of `step` with `key`."""
        return any(row["step"] == step and key in row for row in self.rows)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self.trackers.close()


class Monitor:
    """Rows of metrics. All ranks make one and call it at the same points; only rank 0 writes.

    Args:
        title: Label of the progress bar.
        steps: Last step of the run.
        flops_per_sample: Forward and backward pass of one sample, in FLOPs.
        peak: FLOP/s of one accelerator; None: unknown, and MFU is left out.
        log_every: Steps between two rows.
        trackers: Where the run is shown, as `engine.tracker` gives them.
    """

    def __init__(
        self,
        run_dir: RunDir,
        world: World,
        *,
        title: str,
        steps: int,
        global_batch: int,
        tokens_per_sample: int,
        flops_per_sample: float,
        peak: float | None,
        log_every: int,
        trackers: Sequence[str] = (),
    ) -> None:
        self.trackers = tuple(trackers)
        self.run_dir, self.world, self.title, self.steps = run_dir, world, title, steps
        self.global_batch, self.tokens_per_sample = global_batch, tokens_per_sample
        self.flops_per_sample, self.peak, self.log_every = flops_per_sample, peak, log_every
        self.sums = MetricSums()
        self.waited_s = 0.0
        self.damaged = 0
        self._row_begun = time.perf_counter()
        self._row_first_step = 0
        self._log: MetricsLog | None = None
        self._bar: Any = None

    # --- opening and closing ----------------------------------------------------------------------------------------

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        """Open the logs at `step`; what an earlier start wrote after it is removed.

        Args:
            state: The unfinished row of an earlier start, from a checkpoint; None: there is none.
        """
        if state:
            self.sums = MetricSums(**state)
        # Speed is measured from here, since reading data and checkpoints before is not what a step costs.
        self._row_begun, self._row_first_step = time.perf_counter(), step
        if not self.world.is_main:
            return
        from tqdm import tqdm

        config = self.run_dir.path / CONFIG
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        self._log = MetricsLog(TrackedRun(self.run_dir.path, step, text), self.trackers)
        verb = f"continues at step {step} in" if step else "writes to"
        folder = os.path.relpath(self.run_dir.path)
        folder = str(self.run_dir.path) if folder.startswith("..") else folder
        log.info("%s: %s %s", self.title, verb, folder)
        # A terminal gets a live bar, a log file a line every half minute.
        quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0, "ascii": True, "ncols": 100}
        self._bar = tqdm(total=self.steps, initial=step, desc=self.title, unit="step", dynamic_ncols=not quiet, **quiet)

    def has_row(self, step: int, key: str) -> bool:
        """Whether an earlier start has logged `key` at `step`; true on a rank that writes nothing."""
        return self._log is None or self._log.has(step, key)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; empty on a rank that writes nothing."""
        return self._log.rows if self._log is not None else []

    def state(self) -> dict[str, Any]:
        """The sums of the unfinished row, for a checkpoint."""
        return asdict(self.sums)

    def close(self) -> None:
        """Flush and close the logs."""
        for output in (self._bar, self._log):
            if output is not None:
                output.close()
        self._bar = self._log = None

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        waited_s: float,
        damaged: int = 0,
        terms: Mapping[str, float] | None = None,
    ) -> None:
        """Count a step and write a row when one is due.

        Args:
            step: Updates that are done now.
            loss: Mean over all samples of the global batch.
            waited_s: Seconds that this rank waited for data.
            damaged: Damaged samples that this rank's stream has skipped since it was opened.
            terms: Means of the loss's terms, by name, where there are several.
        """
        self.damaged = damaged
        sums = self.sums
        sums.steps += 1
        sums.loss += loss
        sums.grad_norm += grad_norm
        for name, value in (terms or {}).items():
            sums.terms[name] = sums.terms.get(name, 0.0) + value
        self.waited_s += waited_s
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(1)
        if step % self.log_every == 0 or step == self.steps:
            self._write_row(step, lr)

    def skipped(self) -> None:
        """A step was skipped for a loss that was not finite."""
        self.sums.skipped += 1

    def _write_row(self, step: int, lr: float) -> None:
        sums = self.sums
        seconds = time.perf_counter() - self._row_begun
        # Speed is that of this start's own steps. Of waiting and memory, the largest value of all ranks counts.
        rate = (step - self._row_first_step) / seconds
        # The slowest rank holds up all others, so the largest wait is what the step lost, and a mean would hide it.
        largest = all_reduce_max(torch.tensor([self.waited_s, float(peak_memory(self.world.device))]), self.world)
        row = {
            "step": step,
            "loss": sums.loss / sums.steps,
            **{f"loss_{name}": total / sums.steps for name, total in sums.terms.items()},
            "lr": lr,
            "grad_norm": sums.grad_norm / sums.steps,
            "steps_per_s": rate,
            "images_per_s": rate * self.global_batch,
            "tokens_per_s": rate * self.global_batch * self.tokens_per_sample,
            "model_tflops_per_s": rate * self.global_batch * self.flops_per_sample / 1e12,
            "mfu": mfu(rate * self.global_batch, self.flops_per_sample, self.peak, self.world.world_size),
            "data_wait_s": float(largest[0]),
            "data_wait_fraction": float(largest[0]) / seconds,
            "peak_memory_gib": float(largest[1]) / 2**30,
            "skipped": sums.skipped,
            "damaged_samples": float(all_reduce_sum(torch.tensor([float(self.damaged)]), self.world)[0]),
        }
        self.sums, self.waited_s = MetricSums(), 0.0
        self._row_begun, self._row_first_step = time.perf_counter(), step
        self.scalars(step, row)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Write numbers as one row of metrics.jsonl, which trackers show as well."""
        if self._log is not None:
            self._log.write(step, values)

    def images(self, step: int, images: dict[str, Tensor]) -> None:
        """Show images, [3, H, W] or [1, H, W] in 0..1."""
        if self._log is not None:
            self._log.trackers.images(step, images)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        """Show histograms of tensors of any shape."""
        if self._log is not None:
            self._log.trackers.histograms(step, values)

    def texts(self, step: int, values: dict[str, str]) -> None:
        """Show texts (Markdown)."""
        if self._log is not None:
            self._log.trackers.texts(step, values)

    def finish(self, step: int, settings: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        """Add the finished run to the trackers' tables of runs (`Trackers.finish`)."""
        if self._log is not None and settings:
            self._log.trackers.finish(step, settings, losses)

    def warn(self, message: str) -> None:
        """Log a warning, on rank 0."""
        if self.world.is_main:
            log.warning(message)


def keep_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl after its last row up to `step`, and return the rows that stay.

    A line that a crash left incomplete ends the file as well.
    """
    if not path.exists():
        return []
    rows, kept = [], 0
    with open_regular(path) as handle:
        for line in handle:
            row = as_row(line)
            if row is None or not line.endswith(b"\n") or row["step"] > step:
                break
            rows.append(row)
            kept += len(line)
    # Cut in place: another program may follow the file (`tail -f`), which a rename would leave behind.
    os.truncate(path, kept)
    return rows


def mfu(images_per_s: float, flops_per_sample: float, peak: float | None, world_size: int) -> float | None:
    """Model FLOPs utilization: the share of all accelerators' peak that the model's arithmetic takes."""
    return images_per_s * flops_per_sample / (peak * world_size) if peak else None


def peak_memory(device: torch.device | None) -> int:
    """The most bytes that were allocated on the GPU, or the largest resident set of the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _json_number(value: Any) -> Any:
    """JSON has no NaN: such a number is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
