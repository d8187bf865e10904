"""The state of the tasks of a fan-out, or of a single run, read from its run directory without writing to it."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from fine_dist.core.errors import RunDirError
from fine_dist.core.regular_files import last_row
from fine_dist.engine.run_dir import RunDir, owner_of
from fine_dist.launchers.state_table import StateTable, Submissions, TaskRow

if TYPE_CHECKING:
    from rich.table import Table

COLORS = {"done": "green", "running": "cyan", "failed": "red", "lost": "red", "queued": "yellow", "pending": "dim"}
"""All states, in the order of the summary, and their colors in the terminal."""
ENDED = ("done", "failed", "lost")
"""States that do not change unless a task is started again."""
FACTS = ("step", "loss", "held_out_loss", "steps_per_s", "images_per_s", "data_wait_fraction", "peak_memory_gib")
"""Keys of a run's newest metrics that are shown."""
ORDER = ("failed", "lost", "running", "queued", "pending", "done")
"""States in the order of the table's rows."""


class TaskStatus(TypedDict, total=False):
    """The state of one task, or of a single run, as plain values (JSON)."""

    name: str
    """Name of the task, or kind of the run."""
    index: int
    """Position in the fan-out."""
    state: str
    """A key of `COLORS`. `lost`: the process was killed; `queued`: the job waits in a scheduler's queue."""
    reason: str | None
    """Why the last attempt failed or stopped."""
    attempts: int
    """Number of times the task was started."""
    deaths: int
    """Number of attempts whose process was killed."""
    host: str | None
    """Host of the last attempt."""
    pid: int | None
    """Process id of the last attempt."""
    job: str | None
    """The scheduler's name of the job."""
    run_dir: str | None
    """Run directory of the task."""
    started: float | None
    """Unix time of the last start."""
    seconds: float | None
    """Duration of the last attempt in seconds; until now if it is running."""
    owner: str | None
    """Single run: the live process that owns the run directory."""
    done: dict[str, object] | None
    """Single run: the content of DONE.json."""
    last: dict[str, object]
    """Single run: its newest metrics."""


def read(run_dir: Path) -> list[TaskStatus]:
    """The state of every task of a fan-out, or of a single run.

    Raises:
        RunDirError: Nothing has run in this directory, or a file of it is damaged.
    """
    table = StateTable(run_dir)
    rows = table.rows()
    if not rows:
        return [read_run(run_dir)]
    job_of = {name: job for job, names in Submissions(run_dir).all().items() for name in names}
    return [_status(table, row, job_of.get(row.name)) for row in rows]


def _status(table: StateTable, row: TaskRow, submitted: str | None) -> TaskStatus:
    state: str = row.state
    if table.lost(row):
        state = "lost"
    elif row.state == "pending" and submitted:
        state = "queued"
    seconds = time.time() - row.started if row.state == "running" and row.started else row.seconds
    return TaskStatus(
        name=row.name, index=row.index, state=state, reason=row.reason, attempts=row.attempts, deaths=row.deaths,
        host=row.host, pid=row.pid, job=row.job or submitted, run_dir=row.run_dir, started=row.started, seconds=seconds,
    )  # fmt: skip


def read_run(run_dir: Path) -> TaskStatus:
    """The state of a single run: its kind, its owner, its newest metrics and, once it is done, DONE.json.

    The state is `pending` when the run was stopped or its process was killed, and the same command continues it.

    Raises:
        RunDirError: Nothing has run in this directory.
    """
    run, submitted = RunDir(run_dir), Submissions(run_dir).all()
    kind, owner = run.kind, owner_of(run_dir)
    # A run that still loads its data has written no file, and so has no kind, but it holds the lock.
    if kind is None and not submitted and owner is None:
        raise RunDirError(
            f"{run_dir}: nothing has run here (neither tasks/ nor config.yaml nor a submitted job); give a run_dir"
        )
    done = run.done
    # Two rows, because the held-out loss is measured less often than the training loss is logged.
    newest = last_row(run.metrics, "loss") or {}
    held_out = last_row(run.metrics, "held_out_loss") or {}
    state = "done" if done is not None else "running" if owner else "queued" if submitted and not kind else "pending"
    return TaskStatus(
        name=kind or next((names[0] for names in submitted.values()), "a run before its first step"),
        index=0,
        state=state,
        owner=owner,
        job=next(reversed(submitted), None),
        done=done,
        # Of keys that are in both rows, the newest row's values are taken.
        last={key: value for key, value in {**held_out, **newest}.items() if key in FACTS},
    )


def summary(rows: list[TaskStatus]) -> str:
    """The number of tasks in each state: `12 tasks: 9 done, 1 failed, 2 running`."""
    counts = Counter(row["state"] for row in rows)
    return f"{len(rows)} tasks: " + ", ".join(f"{counts[state]} {state}" for state in COLORS if counts[state])


def show(rows: list[TaskStatus], limit: int) -> Table:
    """A table of at most `limit` tasks in the order of `ORDER`; for a single run, its facts."""
    from rich.table import Table
    from rich.text import Text

    if "last" in rows[0]:
        return _show_run(rows[0])
    table = Table(caption=summary(rows), box=None, header_style="bold")
    for head in ("task", "state", "attempts", "seconds", "where", "job", "reason"):
        table.add_column(head, overflow="fold", justify="right" if head in ("attempts", "seconds") else "left")
    for row in sorted(rows, key=lambda row: (ORDER.index(row["state"]), row["index"]))[:limit]:
        seconds = f"{row['seconds']:.0f}" if row["seconds"] is not None else ""
        where = f"{row['host']}:{row['pid']}" if row["host"] and row["state"] == "running" else row["host"] or ""
        table.add_row(
            row["name"], _colored(row["state"]), str(row["attempts"]), seconds, where, row["job"] or "",
            Text(row["reason"] or ""),
        )  # fmt: skip
    if len(rows) > limit:
        table.add_row(f"... and {len(rows) - limit} more (--all)")
    return table


def _show_run(row: TaskStatus) -> Table:
    """The facts of a single run as a table with one line for each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(Text(row["name"]), _colored(row["state"]))
    facts = {"owner": row["owner"], "job": row["job"], **row["last"], **(row["done"] or {})}
    for key, value in facts.items():
        if value is not None:
            table.add_row(Text(key), Text(f"{value:,.6g}" if isinstance(value, float) else str(value)))
    return table


def _colored(state: str) -> str:
    return f"[{COLORS[state]}]{state}[/]"
