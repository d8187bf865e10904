"""What a run says while it runs: TensorBoard, metrics.jsonl and a progress bar, from rank 0 only.

Every number is a mean over the steps since the last row, and losses are means over the samples of *all* ranks. The sums
of an unfinished row are part of a checkpoint, so a resumed run writes the rows that an uninterrupted one would have.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.engine.dist import World, all_reduce_max, all_reduce_sum
from fine_dist.engine.run_dir import RunDir

log = logging.getLogger(__name__)


@dataclass
class Window:
    """Sums over the steps since the last row."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    skipped: int = 0


class Monitor:
    """Rows of metrics. All ranks make one and call it alike; only rank 0 writes.

    flops_per_sample: forward and backward of the model, in FLOPs. peak: FLOP/s of one accelerator, or none.
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
    ) -> None:
        self.run_dir, self.world, self.title, self.steps = run_dir, world, title, steps
        self.global_batch, self.tokens_per_sample = global_batch, tokens_per_sample
        self.flops_per_sample, self.peak, self.log_every = flops_per_sample, peak, log_every
        self.window = Window()
        self.waited_s = 0.0
        self.bad = 0
        self._row_begun = time.perf_counter()
        self._row_first_step = 0
        self._log: Any = None
        self._board: Any = None
        self._bar: Any = None

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self, step: int, state: dict[str, Any] | None) -> None:
        """Open the logs at `step`: what an earlier start wrote beyond it is removed."""
        if state:
            self.window = Window(**state)
        self._row_begun, self._row_first_step = time.perf_counter(), step
        if not self.world.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.rows = keep_rows(self.run_dir.metrics, step)
        self._log = open(self.run_dir.metrics, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed in `close`
        # purge_step hides what an earlier start logged at later steps, so that no step shows twice.
        self._board = SummaryWriter(str(self.run_dir.tensorboard), purge_step=step + 1 if step else None)
        verb = "continues at step {} in" if step else "writes to"
        where = os.path.relpath(self.run_dir.path)
        where = str(self.run_dir.path) if where.startswith("..") else where
        log.info("%s: %s %s", self.title, verb.format(step), where)
        # A log file gets a line now and then, a terminal a live bar.
        quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0, "ascii": True, "ncols": 100}
        self._bar = tqdm(total=self.steps, initial=step, desc=self.title, unit="step", dynamic_ncols=not quiet, **quiet)

    def has_row(self, step: int, key: str) -> bool:
        """Whether an earlier start has logged this; on a rank that writes nothing, as if it had."""
        return self._log is None or any(row["step"] == step and key in row for row in self.rows)

    def state(self) -> dict[str, Any]:
        """The unfinished row, for a checkpoint."""
        return asdict(self.window)

    def close(self) -> None:
        """Flush and close the logs."""
        for thing in (self._bar, self._board, self._log):
            if thing is not None:
                thing.close()
        self._bar = self._board = self._log = None

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self, step: int, *, loss: float, grad_norm: float, lr: float, waited_s: float, bad: int = 0) -> None:
        """Count a step (`step` updates are done now) and write a row when one is due.

        loss: mean over all samples of the global batch, on all ranks. waited_s: seconds this rank waited for data.
        bad: damaged samples that this rank's stream has skipped since it was opened.
        """
        self.bad = bad
        window = self.window
        window.steps += 1
        window.loss += loss
        window.grad_norm += grad_norm
        self.waited_s += waited_s
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(1)
        if step % self.log_every == 0 or step == self.steps:
            self._write_row(step, lr)

    def skipped(self) -> None:
        """A step was skipped for a loss that was not finite."""
        self.window.skipped += 1

    def _write_row(self, step: int, lr: float) -> None:
        window = self.window
        seconds = time.perf_counter() - self._row_begun
        # Speed is measured over this start's own steps; the slowest rank's waiting is the one that counts.
        rate = (step - self._row_first_step) / seconds
        slowest = all_reduce_max(torch.tensor([self.waited_s, float(peak_memory(self.world.device))]), self.world)
        row = {
            "step": step,
            "loss": window.loss / window.steps,
            "lr": lr,
            "grad_norm": window.grad_norm / window.steps,
            "steps_per_s": rate,
            "images_per_s": rate * self.global_batch,
            "tokens_per_s": rate * self.global_batch * self.tokens_per_sample,
            "model_tflops_per_s": rate * self.global_batch * self.flops_per_sample / 1e12,
            "mfu": mfu(rate * self.global_batch, self.flops_per_sample, self.peak, self.world.world_size),
            "data_wait_s": float(slowest[0]),
            "data_wait_fraction": float(slowest[0]) / seconds,
            "peak_memory_gib": float(slowest[1]) / 2**30,
            "skipped": window.skipped,
            "damaged_samples": float(all_reduce_sum(torch.tensor([float(self.bad)]), self.world)[0]),
        }
        self.window, self.waited_s = Window(), 0.0
        self._row_begun, self._row_first_step = time.perf_counter(), step
        self.scalars(step, row)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Write numbers as one row of metrics.jsonl and as TensorBoard scalars."""
        if self._log is None:
            return
        row = {"step": step, **{key: value for key, value in values.items() if value is not None}}
        self._log.write(json.dumps({key: _json_number(value) for key, value in row.items()}) + "\n")
        self.rows.append(row)
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(f"train/{key}" if key in values else key, value, step)

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Write pictures, [3, H, W] or [1, H, W] in 0..1."""
        if self._board is not None:
            for name, picture in pictures.items():
                self._board.add_image(name, picture, step)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        """Write histograms of tensors of any shape."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_histogram(name, value, step)

    def texts(self, step: int, values: dict[str, str]) -> None:
        """Write texts (Markdown)."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_text(name, value, step)

    def note(self, text: str) -> None:
        """Say something without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)


def keep_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut metrics.jsonl after the last row of `step` or before, and give the rows that stay.

    A line that a crash left half-written ends the file too.
    """
    if not path.exists():
        return []
    rows, kept = [], 0
    with open(path, "rb") as handle:
        for line in handle:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or row["step"] > step:
                break
            rows.append(row)
            kept += len(line)
    os.truncate(path, kept)
    return rows


def mfu(images_per_s: float, flops_per_sample: float, peak: float | None, world_size: int) -> float | None:
    """Model FLOPs utilisation: what the model's arithmetic takes of the peak of all accelerators."""
    return images_per_s * flops_per_sample / (peak * world_size) if peak else None


def peak_memory(device: torch.device | None) -> int:
    """Bytes: the most that was allocated on the GPU, or the process's largest resident set."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _json_number(value: Any) -> Any:
    """JSON has no NaN: such a number is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
