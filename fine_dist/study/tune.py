"""Fair tuning: every row tries the same grid on a seed that is not reported; the lowest held-out loss decides.

The last stage of a row is tuned: stage 3, or stage 2 if that is its only training. The stages before it run once for
all values. A grid of numbers is extended in geometric steps while the best value lies at an end. Choices and losses are
written to tuned.json in the study's folder.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

from fine_dist.core.config import validate
from fine_dist.core.errors import TrainingError
from fine_dist.core.files import write_atomic
from fine_dist.core.regular_files import last_row
from fine_dist.study import settings
from fine_dist.study.config import StudyConfig, StudyEntry, StudyStage, merged
from fine_dist.study.graph import Graph, StudyRun
from fine_dist.study.scheduler import follow

FILE = "tuned.json"
Point = dict[str, Any]
"""One combination of tuned values, by dotted key."""


@dataclass
class Trial:
    """One point tried for an entry."""

    entry: str
    values: Point
    run: StudyRun
    depth: int
    final: bool

    @property
    def loss(self) -> float | None:
        """The held-out loss at the end; None if it is not finite or the run failed (the loss diverged)."""
        if not self.run.done:
            return None
        folder = settings.target_folder(self.run.config, self.depth) if self.final else self.run.run_dir
        row = last_row(folder / "metrics.jsonl", "held_out_loss")
        return row["held_out_loss"] if row and math.isfinite(row["held_out_loss"]) else None


def tune_study(study: StudyConfig, launcher: str) -> tuple[StudyConfig, dict[str, list[dict[str, Any]]]]:
    """Run the trials that are not done and choose the best point of each entry.

    Returns:
        The study with the chosen values in its entries; and by entry all points, as {values, held_out_loss, chosen}.
    """
    if not study.tune:
        return study, {}
    grids: dict[str, list[Point]] = {e.name: points(study) for e in study.rows if e.name not in study.tuned}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for extension in range(study.tune_extend + 1):
        graph, tried = trials(study, grids)
        if tried:
            keys = ", ".join(study.tune)
            what = "grids extended where the best value lay at an end" if extension else f"grid of {keys}"
            print(f"tuning: {len(tried)} trials on seed {study.tune_seed}, {what}", flush=True)
            failed = follow(graph, launcher, {trial.run.name for trial in tried})
            for name, why in failed.items():
                print(f"note: trial {name} counts as worse than all others, because it failed: {why.splitlines()[0]}")
        chosen = choose(tried)
        more = {name: extended(study, rows) for name, rows in chosen.items()}
        if not any(more.values()):
            break
        grids = {name: [*grid, *more[name]] for name, grid in grids.items()}
    # Given values are written as well, so that a study that was tuned elsewhere has the same file and report.
    chosen |= given(study)
    write_atomic(study.root / FILE, json.dumps(chosen, indent=1) + "\n")
    return with_choices(study, chosen), chosen


def trials(study: StudyConfig, grids: dict[str, list[Point]] | None = None) -> tuple[Graph, list[Trial]]:
    """The runs of tuning in a graph of their own, and the point that each of them tries.

    Args:
        study: The study.
        grids: Points by entry; None: the study's grid for every row without given values.
    """
    graph = Graph(study)
    tried = []
    for name in study.data:
        if study.encodes(name):
            graph.data(name)
    for entry in study.rows:
        grid = points(study) if grids is None else grids.get(entry.name, [])
        if entry.name in study.tuned or not grid:
            continue
        depth = depth_of(study, entry)
        # One depth for all trials, because the grid would otherwise run once for every depth.
        small = entry.model_copy(update={"depths": (depth,)})
        final = entry.init is not None and entry.init.final
        # earlier stages are added first, so that they get their names from the entry and not from a trial
        if small.condense:
            graph.condense(small, study.tune_seed)
        if small.init and not final:
            graph.init(small, study.tune_seed)
        for i, point in enumerate(grid):
            changed = _with(small, point, f"tune-{entry.name}-{i}")
            run = graph.init(changed, study.tune_seed) if final else graph.train(changed, depth, study.tune_seed)[0]
            tried.append(Trial(entry.name, point, run, depth, final))
    return graph, tried


def points(study: StudyConfig) -> list[Point]:
    """Every combination of the grid's values."""
    return [dict(zip(study.tune, values)) for values in itertools.product(*study.tune.values())]


def extended(study: StudyConfig, rows: list[dict[str, Any]]) -> list[Point]:
    """The points beyond the ends of a grid to try next; empty if the best value lies inside.

    The next value keeps the ratio of the last two (1e-3, 2e-3 -> 4e-3); grids with 0 or with text are not extended.
    """
    best = next(row["values"] for row in rows if row["chosen"])
    candidates = []
    for key in study.tune:
        values = sorted({row["values"][key] for row in rows if isinstance(row["values"][key], (int, float))})
        if len(values) < 2 or values[0] <= 0 or best[key] not in (values[0], values[-1]):
            continue
        low = best[key] == values[0]
        near, next_to_it = (values[0], values[1]) if low else (values[-1], values[-2])
        # Rates and ranks are searched on a geometric grid, where the next point keeps the ratio.
        value = near * near / next_to_it
        # an integer setting, such as a rank, stays an integer
        candidates.append({**best, key: round(value) if isinstance(near, int) else float(f"{value:.4g}")})
    return [point for point in candidates if point not in [row["values"] for row in rows]]


def depth_of(study: StudyConfig, entry: StudyEntry) -> int:
    """Layers of the targets on which an entry is tuned."""
    depths = study.depths_of(entry)
    return study.tune_depth if study.tune_depth in depths else depths[0]


def _with(entry: StudyEntry, point: Point, name: str | None = None) -> StudyEntry:
    """An entry with these values in its last stage; with a name, only its first length, under that name."""
    changes: dict[str, Any] = {}
    for key, value in point.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        changes = merged(changes, value)
    update: dict[str, Any] = {}
    if entry.init and entry.init.final:
        stage = {"settings": merged(entry.init.settings, changes), **({"name": name} if name else {})}
        update["init"] = entry.init.model_copy(update=stage)
    else:
        update["settings"] = merged(entry.settings, changes)
    if name:
        # stages that all points share keep the names that they have for the entry
        for key in ("condense", "init"):
            stage = update.get(key) or getattr(entry, key)
            if isinstance(stage, StudyStage) and stage.name is None:
                update[key] = stage.model_copy(update={"name": f"{key}-{entry.name}"})
        update |= {"name": name, "train": entry.train[:1]}
    return entry.model_copy(update=update)


def choose(tried: list[Trial]) -> dict[str, list[dict[str, Any]]]:
    """For each entry all points as {values, held_out_loss, chosen}; the lowest loss is chosen.

    Raises:
        TrainingError: No point of an entry has a finite loss.
    """
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for trial in tried:
        rows_of.setdefault(trial.entry, []).append(
            {"values": trial.values, "held_out_loss": trial.loss, "chosen": False}
        )
    for name, rows in rows_of.items():
        finite = [row for row in rows if row["held_out_loss"] is not None]
        if not finite:
            raise TrainingError(
                f"tuning of {name}: no value of {', '.join(rows[0]['values'])} has a finite loss; change the tune grid"
            )
        min(finite, key=lambda row: row["held_out_loss"])["chosen"] = True
    return rows_of


def given(study: StudyConfig) -> dict[str, list[dict[str, Any]]]:
    """The entries whose values the study gives (`tuned`), in the form of `choose`; their losses are unknown."""
    rows_of = {}
    for entry in study.rows:
        values = study.tuned.get(entry.name)
        if values is not None:
            point = {key: values[key] for key in study.tune}
            grid = points(study) if point in points(study) else [*points(study), point]
            rows_of[entry.name] = [{"values": p, "held_out_loss": None, "chosen": p == point} for p in grid]
    return rows_of


def with_choices(study: StudyConfig, chosen: dict[str, list[dict[str, Any]]]) -> StudyConfig:
    """The study with the chosen values in its entries."""
    entries = []
    for entry in study.entries:
        values = next((row["values"] for row in chosen.get(entry.name, []) if row["chosen"]), None)
        entries.append((_with(entry, values) if values else entry).model_dump())
    return validate(StudyConfig, {**study.model_dump(), "entries": entries}, "the tuned study")
