"""Logs of a run, which rank 0 writes during training: metrics.jsonl, the trackers and a progress bar.

Every number is a mean over the steps since the last row, and losses are means over the samples of *all* ranks. The sums
of an unfinished row are part of a checkpoint, so that a resumed run writes the same rows as an uninterrupted one.
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
    """The loss terms by name, if there are several."""


class MetricsLog:
    """The numbers of one run: rows of metrics.jsonl, which its trackers display as `train/NAME`.

    Args:
        run: The run. Rows after its step are removed, and hidden in TensorBoard, so that no step appears twice.
        trackers: Names of trackers, as in the setting `engine.tracker`.
    """

    def __init__(self, run: TrackedRun, trackers: Sequence[str]) -> None:
        metrics = run.folder / METRICS
        # Rows after the checkpoint belong to updates that are lost and will be repeated.
        self.rows = truncate_rows(metrics, run.step)
        # Appended without a buffer: each row is one write, so that a reader never sees half a row unless the machine
        # crashes, and a row whose write failed is not in a buffer that the next row would flush again.
        self._file = open(metrics, "ab", buffering=0)  # noqa: SIM115 - closed in `close`
        self.trackers = Trackers(run, trackers)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a row; values that are None are omitted."""
        row = {"step": step, **{key: value for key, value in values.items() if value is not None}}
        line = (json.dumps({key: _json_number(value) for key, value in row.items()}) + "\n").encode()
        while line:
            # Retried, because shared file systems fail for short times and a run of days should survive that.
            line = line[retry(lambda: self._file.write(line)) :]  # noqa: B023 - it is called at once
        self.rows.append(row)
        self.trackers.scalars(step, {f"train/{key}": value for key, value in row.items() if key != "step"})

    def has(self, step: int, key: str) -> bool:
        """Whether there is a row of `step` with `key`."""
        return any(row["step"] == step and key in row for row in self.rows)

    def close(self) -> None:
        """Close metrics.jsonl and the trackers."""
        self._file.close()
        self.trackers.close()


class Monitor:
    """Writes rows of metrics. All ranks create one and call its methods at the same points; only rank 0 writes.

    Args:
        title: Label of the progress bar.
        steps: Last step of the run.
        global_batch: Samples per step, over all ranks.
        tokens_per_sample: Number of tokens of a sample.
        flops_per_sample: FLOPs of the forward and backward pass of one sample.
        peak: Peak FLOP/s of one accelerator. None: unknown; rows have no MFU.
        log_every: Steps between two rows.
        trackers: Names of trackers, as in the setting `engine.tracker`.
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
        """Open the logs at `step` and remove rows that an earlier start wrote after it.

        Args:
            step: Updates that are done.
            state: The unfinished row of an earlier start, from a checkpoint. None: there is none.
        """
        if state:
            self.sums = MetricSums(**state)
        # Speed is measured from here, because opening data and checkpoints is not part of a step.
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
        # A terminal shows a live bar; a log file gets one line every 30 seconds.
        quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0, "ascii": True, "ncols": 100}
        self._bar = tqdm(total=self.steps, initial=step, desc=self.title, unit="step", dynamic_ncols=not quiet, **quiet)

    def has_row(self, step: int, key: str) -> bool:
        """Whether metrics.jsonl has `key` at `step`; true on ranks that do not write."""
        return self._log is None or self._log.has(step, key)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; empty on ranks that do not write."""
        return self._log.rows if self._log is not None else []

    def state(self) -> dict[str, Any]:
        """The sums of the unfinished row, for a checkpoint."""
        return asdict(self.sums)

    def close(self) -> None:
        """Close the progress bar and the logs."""
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
        """Add a step to the sums and write a row when one is due.

        Args:
            step: Updates that are done, including this one.
            loss: Mean over the samples of the global batch.
            grad_norm: Global norm of the gradients before clipping.
            lr: Learning rate of the step.
            waited_s: Seconds that this rank waited for data.
            damaged: Damaged samples that this rank's stream has skipped since it was opened.
            terms: Means of the loss terms by name, if there are several.
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
        """Count a step that was skipped because its loss was not finite."""
        self.sums.skipped += 1

    def _write_row(self, step: int, lr: float) -> None:
        sums = self.sums
        seconds = time.perf_counter() - self._row_begun
        # Speed is measured over the steps of this start only.
        rate = (step - self._row_first_step) / seconds
        # The maximum over ranks: all ranks wait for the slowest one, which a mean would hide.
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
        """Write numbers as one row of metrics.jsonl and to the trackers."""
        if self._log is not None:
            self._log.write(step, values)

    def images(self, step: int, images: dict[str, Tensor]) -> None:
        """Log images, [3, H, W] or [1, H, W] in 0..1, to the trackers."""
        if self._log is not None:
            self._log.trackers.images(step, images)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        """Log histograms of tensors of any shape to the trackers."""
        if self._log is not None:
            self._log.trackers.histograms(step, values)

    def texts(self, step: int, values: dict[str, str]) -> None:
        """Log texts (Markdown) to the trackers."""
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


def truncate_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Truncate metrics.jsonl after the last row up to `step`; returns the remaining rows.

    The file is also truncated at a line that a crash has left incomplete.
    """
    if not path.exists():
        return []
    rows, num_bytes = [], 0
    with open_regular(path) as handle:
        for line in handle:
            row = as_row(line)
            if row is None or not line.endswith(b"\n") or row["step"] > step:
                break
            rows.append(row)
            num_bytes += len(line)
    # In place and not by a rename, because another program may follow the file (`tail -f`).
    os.truncate(path, num_bytes)
    return rows


def mfu(images_per_s: float, flops_per_sample: float, peak: float | None, world_size: int) -> float | None:
    """Model FLOPs utilization: the model's FLOP/s divided by the peak of all accelerators; None if it is unknown."""
    return images_per_s * flops_per_sample / (peak * world_size) if peak else None


def peak_memory(device: torch.device | None) -> int:
    """Peak bytes allocated on the GPU, or for a CPU the peak resident set of the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _json_number(value: Any) -> Any:
    """NaN and Inf, which JSON does not have, as None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
