"""Fair tuning: every row tries the same values, on a seed that is not reported, and the held-out loss chooses.

What is tried is the last stage of a row: stage 3, or stage 2 where that is all the training there is. Whatever comes
before it is made once for all values. The choices stand in tuned.json of the study's folder, with the losses.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

from fine_dist.core.config import validate
from fine_dist.core.errors import TrainingError
from fine_dist.core.files import last_row, write_atomic
from fine_dist.study import settings
from fine_dist.study.config import Entry, Stage, StudyConfig, merged
from fine_dist.study.graph import Graph, Run

FILE = "tuned.json"


@dataclass
class Trial:
    """One value (or one of each of several) tried for an entry."""

    entry: str
    values: dict[str, Any]
    run: Run
    depth: int
    final: bool

    @property
    def loss(self) -> float | None:
        """The held-out loss at its end; none where there is none, or it is not finite."""
        folder = settings.target_folder(self.run.config, self.depth) if self.final else self.run.run_dir
        row = last_row(folder / "metrics.jsonl", "held_out_loss")
        return row["held_out_loss"] if row and math.isfinite(row["held_out_loss"]) else None


def trials(study: StudyConfig) -> tuple[Graph, list[Trial]]:
    """The runs that tuning takes, in a graph of their own, and what each of them tries."""
    graph = Graph(study)
    found = []
    for name in study.data:
        graph.data(name)
    for entry in study.rows:
        if entry.name in study.chosen:
            continue
        depth = depth_of(study, entry)
        small = entry.model_copy(update={"depths": (depth,)})
        for i, point in enumerate(points(study)):
            changed, final = _with(small, point, f"tune-{entry.name}-{i}"), entry.init is not None and entry.init.final
            # The stages before have their own names, whichever row asked for them first.
            if small.condense:
                graph.condense(small, study.tune_seed)
            if small.init and not final:
                graph.init(small, study.tune_seed)
            run = graph.init(changed, study.tune_seed) if final else graph.train(changed, depth, study.tune_seed)[0]
            found.append(Trial(entry.name, point, run, depth, final))
    return graph, found


def points(study: StudyConfig) -> list[dict[str, Any]]:
    """Every combination of the values: dotted keys."""
    return [dict(zip(study.tune, values)) for values in itertools.product(*study.tune.values())]


def depth_of(study: StudyConfig, entry: Entry) -> int:
    """Layers of the targets that an entry is tuned on."""
    depths = study.depths_of(entry)
    return study.tune_depth if study.tune_depth in depths else depths[0]


def _with(entry: Entry, point: dict[str, Any], name: str | None = None) -> Entry:
    """An entry with these values in its last stage; with a name, only its shortest training, under that name."""
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
        # the stages that all values share are those of the entry itself
        for key in ("condense", "init"):
            stage = update.get(key) or getattr(entry, key)
            if isinstance(stage, Stage) and stage.name is None:
                update[key] = stage.model_copy(update={"name": f"{key}-{entry.name}"})
        update |= {"name": name, "train": entry.train[:1]}
    return entry.model_copy(update=update)


def choose(tried: list[Trial]) -> dict[str, list[dict[str, Any]]]:
    """For each entry what was tried, its loss, and which was chosen. `TrainingError` where none came to a loss."""
    found: dict[str, list[dict[str, Any]]] = {}
    for trial in tried:
        found.setdefault(trial.entry, []).append({"values": trial.values, "held_out_loss": trial.loss, "chosen": False})
    for name, rows in found.items():
        known = [row for row in rows if row["held_out_loss"] is not None]
        if not known:
            raise TrainingError(f"tuning of {name}: no value of {', '.join(rows[0]['values'])} came to a finite loss")
        min(known, key=lambda row: row["held_out_loss"])["chosen"] = True
    return found


def known(study: StudyConfig) -> dict[str, list[dict[str, Any]]]:
    """What `choose` says of the entries whose choice the study's file gives: its losses are not known here."""
    return {
        entry.name: [
            {"values": point, "held_out_loss": None, "chosen": point == {k: study.chosen[entry.name][k] for k in point}}
            for point in points(study)
        ]
        for entry in study.rows
        if entry.name in study.chosen
    }


def tuned(study: StudyConfig, launcher: str) -> tuple[StudyConfig, dict[str, list[dict[str, Any]]]]:
    """The study with the values that were chosen in its entries, and what was tried. Runs what is not done."""
    from fine_dist.study.scheduler import follow

    if not study.tune:
        return study, {}
    graph, tried = trials(study)
    if tried:
        print(f"tuning: {len(tried)} trials of {', '.join(study.tune)} on seed {study.tune_seed}", flush=True)
        follow(graph, launcher)
    found = choose(tried) | known(study)
    write_atomic(study.root / FILE, json.dumps(found, indent=1) + "\n")
    return with_choices(study, found), found


def with_choices(study: StudyConfig, found: dict[str, list[dict[str, Any]]]) -> StudyConfig:
    """The study with the chosen values in its entries."""
    entries = []
    for entry in study.entries:
        values = next((row["values"] for row in found.get(entry.name, []) if row["chosen"]), None)
        entries.append((_with(entry, values) if values else entry).model_dump())
    return validate(StudyConfig, {**study.model_dump(), "entries": entries}, "the tuned study")
