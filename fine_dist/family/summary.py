"""A family at a glance: the table of its targets, its storage, and a figure of loss against depth."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fine_dist.artifacts.locate import ARTIFACT_FOLDERS
from fine_dist.core.errors import RunDirError
from fine_dist.core.files import atomic_file
from fine_dist.engine.trackers import TrackedRun, Trackers
from fine_dist.family.listing import last_row, result_of
from fine_dist.family.members import Member
from fine_dist.launchers.state_table import StateTable
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import read_manifest

log = logging.getLogger(__name__)

COUNTS = (1, 10, 100)
"""Numbers of models, each as large as the family's largest, for which the storage is listed."""


class FamilyBar:
    """A context with one progress bar over all targets, which other processes train; it reads their folders."""

    def __init__(self, members: Sequence[Member], steps: int, every_s: float = 1.0) -> None:
        self.members, self.steps, self.every_s = list(members), steps, every_s
        self._finished: dict[str, float | None] = {}
        """Targets that have ended, with their last losses; their folders are not read again."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="family-bar", daemon=True)

    def __enter__(self) -> FamilyBar:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        quiet = {} if sys.stderr.isatty() else {"mininterval": 30.0, "ascii": True, "ncols": 100}
        begun, bar, took = self._read_progress()[0], None, 0.0
        # reading takes a tenth of the time at most, however many targets there are
        while not self._stop.wait(max(self.every_s, 9 * took)):
            before = time.monotonic()
            done, losses = self._read_progress()
            took = time.monotonic() - before
            if bar is None and done > begun:  # no bar before the first step, because other messages are printed then
                bar = tqdm(total=self.steps * len(self.members), initial=begun, desc="init", unit="step", **quiet)
            if bar is not None:
                self._show(bar, done, losses)
        if bar is not None:
            self._show(bar, *self._read_progress())
            bar.close()

    def _show(self, bar: Any, done: int, losses: list[float]) -> None:
        if losses:
            bar.set_postfix_str(f"loss {min(losses):.4f}..{max(losses):.4f}", refresh=False)
        bar.update(done - bar.n)

    def _read_progress(self) -> tuple[int, list[float]]:
        """(sum of the steps of all targets, their newest losses)."""
        done, losses = self.steps * len(self._finished), []
        for member in self.members:
            if member.name in self._finished:
                continue
            row = last_row(member.folder)
            if result_of(member.folder) is not None:
                self._finished[member.name] = row["loss"] if row else None
                done += self.steps
            elif row:
                done += row["step"]
                losses.append(row["loss"])
        return done, [*losses, *(loss for loss in self._finished.values() if loss is not None)]


def result_lines(run_dir: Path, names: Sequence[str], most: int = 20) -> list[str]:
    """Lines that `init` prints at the end: the targets by held-out loss, their folders, and the next command."""
    done = {name: result for name in names if (result := result_of(run_dir / name)) is not None}
    if not done:
        return []
    key, loss = ("held_out_loss", "held-out loss") if _all_have(done, "held_out_loss") else ("loss", "training loss")
    order = sorted(done, key=lambda name: (_order(done[name].get(key)), name))
    width = max(map(len, order))
    lines = [f"{len(done)} of {len(names)} targets are done; by {loss}:"]
    for name in order[:most]:
        value = done[name].get(key)
        figure = f"{value:.4f}" if value is not None else "not trained"
        lines.append(f"  {name:{width}}  {figure}")
    if len(order) > most:
        lines.append(f"  ... and {len(order) - most} more: fine-dist init --list {run_dir}")
    return [*lines, f"targets are in {run_dir}/NAME", f"next: fine-dist train --parents {run_dir}"]


def _all_have(done: Mapping[str, Mapping[str, Any]], key: str) -> bool:
    return all(result.get(key) is not None for result in done.values())


def _order(value: float | None) -> float:
    return math.inf if value is None else value


def list_family(run_dir: Path) -> list[str]:
    """Lines of a table of all targets with sizes and losses, best held-out loss first, followed by the storage.

    `RunDirError` when the folder is not that of a family.
    """
    table = StateTable(run_dir)
    rows = table.rows() if table.folder.is_dir() else []
    if not rows:
        raise RunDirError(f"{run_dir} is not the folder of a family: give the run_dir of an init")
    width = max(len(row.name) for row in rows)
    lines = [f"{'target':{width}}  depth    numbers      bytes  steps     loss  held-out  seconds  state"]
    stored = 0
    done_of = {row.name: result_of(run_dir / row.name) or {} for row in rows}
    ranked = any(done.get("held_out_loss") is not None for done in done_of.values())
    rows.sort(key=lambda row: _order(done_of[row.name].get("held_out_loss")))
    for row in rows:
        folder = run_dir / row.name
        done, now = done_of[row.name], last_row(folder) or {}
        stored += done.get("bytes", 0)
        state = row.state if row.state != "running" or not table.lost(row) else "lost"
        lines.append(
            f"{row.name:{width}}  {_cell(done.get('depth'), '5')}  {_cell(done.get('numbers'), '9,')}  "
            f"{_cell(done.get('bytes'), '9,')}  {_cell(done.get('steps', now.get('step')), '5')}  "
            f"{_cell(done.get('loss', now.get('loss')), '7.4f')}  {_cell(done.get('held_out_loss'), '8.4f')}  "
            f"{_cell(done.get('seconds'), '7.1f')}  {state}" + (f": {row.reason}" if row.reason else "")
        )
    if not ranked:
        lines.append("no target has a held-out loss (data.held_out): listed in the order of the grid")
    lines += storage(run_dir, [row.name for row in rows], stored)
    return lines


def storage(run_dir: Path, names: Sequence[str], stored: int) -> list[str]:
    """Lines that compare the family's storage with that of the same number of dense models."""
    dense, largest, parents = 0, 0, {}
    by_method: dict[str, list[int]] = {}
    for name in names:
        folder = next(
            (run_dir / name / p for p in ARTIFACT_FOLDERS if (run_dir / name / p / "manifest.json").is_file()), None
        )
        if folder is None:
            continue
        manifest = read_manifest(folder)
        dense_bytes = 4 * Arch.model_validate(manifest["arch"]).count()
        dense += dense_bytes
        by_method.setdefault(str(manifest["method"]["name"]), []).append(manifest["bytes"])
        largest = max(largest, dense_bytes)
        named = manifest["extra"].get("parent") or manifest["extra"].get("learngene")
        if named:
            parent = Path(named["path"])
            parents[named["hash"]] = read_manifest(parent)["bytes"] if (parent / "manifest.json").is_file() else 0
    if not parents:
        return []
    gene_bytes = sum(parents.values())
    comparisons = []
    for method, sizes in by_method.items():
        totals = [(n, gene_bytes + n * max(sizes), n * largest) for n in COUNTS]
        comparisons.append(
            f"n models by {method} and n dense models: "
            + "; ".join(f"{n}: {mib(ours)} and {mib(dense_ones)}" for n, ours, dense_ones in totals)
        )
    return [
        f"stored: parent {mib(gene_bytes)} + {len(names)} targets {mib(stored)} = {mib(gene_bytes + stored)}; "
        f"the same targets as dense models: {mib(dense)} ({dense / max(1, gene_bytes + stored):.1f} x)",
        *comparisons,
    ]


def mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"


def _cell(value: Any, form: str) -> str:
    width = int("".join(c for c in form.split(".")[0] if c.isdigit()))
    return f"{value:{form}}" if value is not None else " " * (width - 1) + "-"


def draw_family(
    run_dir: Path,
    members: Sequence[Member],
    younger_than_s: float = 0.0,
    baselines: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    trackers: Sequence[str] = ("tensorboard",),
) -> Path | None:
    """Draw loss against depth for the family: `family.png`, and the same image in trackers. None without losses.

    Finished targets are drawn at their held-out loss if there is one; targets that still train, as hollow markers, at
    their newest training loss.

    Args:
        run_dir: Folder of the family.
        members: All targets of the family.
        younger_than_s: If positive, an image that is at most this many seconds old is not drawn again.
        baselines: The result of `baselines`: a horizontal line for a single depth, a dashed curve for several.
        trackers: Trackers that show the image.
    """
    path = run_dir / "family.png"
    if younger_than_s and path.exists() and time.time() - path.stat().st_mtime < younger_than_s:
        return path
    import numpy as np
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, dict[int, list[float]]] = {}
    open_points: list[tuple[int, float]] = []
    steps = 0
    for member in members:
        done, now = result_of(member.folder), last_row(member.folder)
        value = done.get("held_out_loss", done.get("loss")) if done else None
        if value is not None:
            label = " ".join([member.domain, f"lr {member.lr:g}", *(value for _, value in member.variant)])
            lines.setdefault(label, {}).setdefault(member.depth, []).append(value)
        elif now is not None:
            open_points.append((member.depth, now["loss"]))
        steps += (now or {}).get("step", 0)
    if not lines and not open_points:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, points in sorted(lines.items()):
        depths = sorted(points)
        axes.plot(depths, [sum(points[d]) / len(points[d]) for d in depths], marker="o", label=label)
    if open_points:
        axes.scatter(*zip(*open_points), facecolors="none", edgecolors="gray", label="still training")
    for label, others in (baselines or {}).items():
        if len({depth for depth, _ in others}) == 1:
            level = sum(loss for _, loss in others) / len(others)
            axes.axhline(level, color="gray", linestyle=":", label=f"{label} ({others[0][0]} layers)")
        else:
            axes.plot(*zip(*sorted(others)), linestyle="--", marker="x", color="gray", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layers of the target", ylabel="loss (held-out where measured)", title=f"{len(members)} targets")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    canvas.draw()
    try:
        with atomic_file(path, ".tmp.png") as draft:
            figure.savefig(draft, dpi=120)
    except OSError as error:  # training continues without the figure
        log.warning("%s cannot be written (%s)", path, error)
    picture = torch.from_numpy(np.array(canvas.buffer_rgba())[:, :, :3]).permute(2, 0, 1) / 255
    # Trackers are opened for each image: the packs of a family run in several processes and share this folder.
    shown = Trackers(TrackedRun(run_dir), trackers)
    shown.images(steps, {"family/loss_against_depth": picture})
    shown.close()
    return path
