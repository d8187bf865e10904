"""Scores of models on disk and on the screen: what `fine-dist evaluate` writes and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError, DataError
from fine_dist.core.files import check_writable, sha256_text, write_atomic
from fine_dist.core.json_files import Record, read_record
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.evaluation.comparison import HELD_OUT_LOSS
from fine_dist.evaluation.evaluator import Evaluator
from fine_dist.evaluation.settings import EvaluateConfig


def run(config: EvaluateConfig) -> Path:
    """Measure every model, print a table and write evaluate.json; returns its path. All ranks take part."""
    if not config.models:
        raise ConfigError("models: give one folder or more with --models")
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = dist.world(config.engine.device)
    evaluator = Evaluator(config, world)
    folder = Path(expand_path(config.run_dir))
    check_writable(folder)
    rows = [evaluator(path) for path in config.models]
    floors = evaluator.references.floors()
    if not world.is_main:
        return folder
    path = record(folder, evaluator.protocol(), rows, floors)
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    for metric, value in floors.items():
        print(f"{metric} of held-out real images to the same reference: {value:.4f}")
    for note in dict.fromkeys([*(note for row in rows for note in row["notes"]), *mixed_processes(rows)]):
        print(f"note: {note}")
    for score in (score for row in rows for score in row["scores"].values() if score["why"]):
        print(f"note: {score['metric']}: {score['why']}")
    print(f"evaluate: {path}")
    return path


def mixed_processes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A warning if the held-out losses of rows cannot be compared, because their diffusion processes differ."""
    measured = [row["diffusion"] for row in rows if "diffusion" in row and row[HELD_OUT_LOSS] is not None]
    predictions = {f"{d['process']} ({DiffusionConfig.model_validate(d).predicts})" for d in measured}
    if len(predictions) < 2:
        return []
    return [f"held-out losses of {' and '.join(sorted(predictions))} measure different things: compare other scores"]


class EvaluateFile(Record):
    """evaluate.json: what was measured, and how."""

    protocol: dict[str, Any]
    """Everything that the numbers depend on; numbers of another protocol are in another file."""
    floors: dict[str, float] = Field(default_factory=dict)
    """Value of each Fréchet distance for held-out real images."""
    rows: list[dict[str, Any]]
    """One row for each model."""


def record(folder: Path, protocol: dict[str, Any], rows: list[dict[str, Any]], floors: dict[str, float]) -> Path:
    """Add rows to the file of their protocol and return it. Numbers of another protocol are never overwritten."""
    # In the form in which it is read back: JSON turns tuples into lists, and the comparison with the file needs that.
    protocol = json.loads(json.dumps(protocol))
    key = sha256_text(json.dumps(protocol, sort_keys=True))
    for path in (folder / "evaluate.json", folder / f"evaluate-{key[:8]}.json"):
        # The second file is named after the protocol, so that the same command finds it again.
        stored = _read(path)
        if stored is None or stored.get("protocol") == protocol:
            break
    new = {_key_of(row) for row in rows}
    before = [row for row in (stored or {}).get("rows", ()) if _key_of(row) not in new]
    text = json.dumps({"protocol": protocol, "floors": floors, "rows": [*before, *rows]}, indent=1)
    # Written atomically: a crash must not lose the rows of earlier commands.
    write_atomic(path, text + "\n")
    return path


def _key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Identifies the subject of a row: a model's weights, or a step of a run."""
    return row.get("model"), row.get("hash"), row.get("step")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_record(EvaluateFile, path, DataError, "move it away, or choose another --run-dir").model_dump()
    except FileNotFoundError:
        return None


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A rich table of rows; a model's name is folded where it is long, never cut."""
    scores_table = Table()
    scores_table.add_column("model", overflow="fold", min_width=12)
    scores_table.add_column("architecture", overflow="fold")
    scores_table.add_column("method", overflow="fold")
    loss = any(row[HELD_OUT_LOSS] is not None for row in rows)
    if loss:
        scores_table.add_column("held-out loss", justify="right")
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["scores"]))
    for metric in metrics:
        name = next(row["scores"][metric]["name"] for row in rows if metric in row["scores"])
        scores_table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        cells = [row["model"], row["arch"] or "-", row["method"]]
        cells += [_figure(row[HELD_OUT_LOSS])] if loss else []
        scores_table.add_row(*cells, *(_cell(row["scores"].get(metric)) for metric in metrics))
    return scores_table


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return _figure(score["value"]) + (f" ± {score['spread']:.2g}" if score["spread"] is not None else "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
