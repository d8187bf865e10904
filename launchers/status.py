"""What became of the tasks of a fan-out, or of a single run, read from its run directory while it goes on."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.errors import RunDirError
from fine_dist.core.files import last_row
from fine_dist.engine.run_dir import RunDir, owner_of
from launchers.state_table import StateTable, Submissions, TaskRow

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "lost": "red", "queued": "yellow", "pending": "dim"}
ENDED = ("done", "failed", "lost")
FACTS = ("step", "loss", "held_out_loss", "steps_per_s", "images_per_s", "data_wait_fraction", "peak_memory_gib")
"""What is shown of a run's newest row of metrics."""


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a fan-out as plain values; `state` is also `lost` (its process is gone) or `queued` (a scheduler
    has it). `RunDirError` when nothing has run here."""
    table = StateTable(run_dir)
    if not table.folder.is_dir():
        return [read_run(run_dir)]
    job_of = {name: job for job, names in Submissions(run_dir).all().items() for name in names}
    found = []
    for row in table.rows():
        values = row.model_dump()
        values["state"] = _state(table, row, job_of)
        values["job"] = row.job or job_of.get(row.name)
        if row.state == "running" and row.started:
            values["seconds"] = time.time() - row.started
        found.append(values)
    return found


def _state(table: StateTable, row: TaskRow, job_of: dict[str, str]) -> str:
    if table.lost(row):
        return "lost"
    return "queued" if row.state == "pending" and row.name in job_of else row.state


def read_run(run_dir: Path) -> dict[str, Any]:
    """A single run: its kind, its state, the process that owns it, its newest numbers and, once it is done, DONE.json.

    `pending`: it was stopped, or its process is gone, and the same command continues it; `queued`: a scheduler has it.
    """
    run, submitted = RunDir(run_dir), Submissions(run_dir).all()
    kind, owner = run.kind, owner_of(run_dir)
    if kind is None and not submitted and owner is None:  # before its first step a run has an owner and no kind
        raise RunDirError(
            f"{run_dir}: nothing has run here (neither tasks/ nor config.yaml nor a submitted job); give a run_dir"
        )
    done = run.done
    newest = last_row(run.metrics, "loss") or {}
    held_out = last_row(run.metrics, "held_out_loss") or {}
    state = "done" if done is not None else "running" if owner else "queued" if submitted and not kind else "pending"
    return {
        "name": kind or next((names[0] for names in submitted.values()), "a run before its first step"),
        "index": 0,
        "state": state,
        "owner": owner,
        "job": next(reversed(submitted), None),
        "done": done,
        "last": {key: value for key, value in ({**held_out, **newest}).items() if key in FACTS},
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """`12 tasks: 9 done, 1 failed, 2 running`."""
    counts = Counter(row["state"] for row in rows)
    return f"{len(rows)} tasks: " + ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state])


def show(rows: list[dict[str, Any]], limit: int) -> Table:
    """A table of at most `limit` rows, what failed and what runs first; or the facts of a single run."""
    from rich.table import Table

    if "last" in rows[0]:
        return _show_run(rows[0])
    order = {"failed": 0, "lost": 0, "running": 1, "queued": 2, "pending": 2, "done": 3}
    picture = Table(caption=summary(rows), box=None, header_style="bold")
    for head in ("task", "state", "attempts", "seconds", "where", "job", "reason"):
        picture.add_column(head, overflow="fold", justify="right" if head in ("attempts", "seconds") else "left")
    for row in sorted(rows, key=lambda row: (order[row["state"]], row["index"]))[:limit]:
        seconds = f"{row['seconds']:.0f}" if row["seconds"] is not None else ""
        where = f"{row['host']}:{row['pid']}" if row["host"] and row["state"] == "running" else row["host"] or ""
        reason = (row["reason"] or "").replace("[", "\\[")
        picture.add_row(
            row["name"], _coloured(row["state"]), str(row["attempts"]), seconds, where, row["job"] or "", reason
        )
    if len(rows) > limit:
        picture.add_row(f"... and {len(rows) - limit} more (--all)")
    return picture


def _show_run(row: dict[str, Any]) -> Table:
    from rich.table import Table

    picture = Table(box=None, show_header=False)
    picture.add_column(style="bold")
    picture.add_column(overflow="fold")
    picture.add_row(row["name"], _coloured(row["state"]))
    facts = {"owner": row["owner"], "job": row["job"], **row["last"], **(row["done"] or {})}
    for key, value in facts.items():
        if value is not None:
            text = f"{value:,.6g}" if isinstance(value, float) else str(value)
            picture.add_row(key, text.replace("[", "\\["))
    return picture


def _coloured(state: str) -> str:
    return f"[{COLOURS[state]}]{state}[/]"
