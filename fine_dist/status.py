"""`python -m fine_dist.status RUN_DIR`: what became of the tasks of a fan-out, live."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.errors import EXIT_TASKS_FAILED, RunDirError, guard
from fine_dist.jobs import Row, StateTable, Submissions

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "lost": "red", "queued": "yellow", "pending": "dim"}


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The rows as plain values; `state` is also `lost` (its process is gone) or `queued` (a scheduler has it)."""
    table = StateTable(run_dir)
    if not table.folder.is_dir():
        raise RunDirError(f"{run_dir}: no state table here (no folder tasks/); give the run_dir of a fan-out")
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


def _state(table: StateTable, row: Row, job_of: dict[str, str]) -> str:
    if table.lost(row):
        return "lost"
    return "queued" if row.state == "pending" and row.name in job_of else row.state


def summary(rows: list[dict[str, Any]]) -> str:
    """`12 tasks: 9 done, 1 failed, 2 running`."""
    counts = Counter(row["state"] for row in rows)
    return f"{len(rows)} tasks: " + ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state])


def show(rows: list[dict[str, Any]], limit: int) -> Table:
    """A table of at most `limit` rows: what failed and what runs first."""
    from rich.table import Table

    order = {"failed": 0, "lost": 0, "running": 1, "queued": 2, "pending": 2, "done": 3}
    picture = Table(caption=summary(rows), box=None, header_style="bold")
    for head in ("task", "state", "attempts", "seconds", "where", "job", "reason"):
        picture.add_column(head, overflow="fold", justify="right" if head in ("attempts", "seconds") else "left")
    for row in sorted(rows, key=lambda row: (order[row["state"]], row["index"]))[:limit]:
        seconds = f"{row['seconds']:.0f}" if row["seconds"] is not None else ""
        state = f"[{COLOURS[row['state']]}]{row['state']}[/]"
        where = f"{row['host']}:{row['pid']}" if row["host"] and row["state"] == "running" else row["host"] or ""
        reason = (row["reason"] or "").replace("[", "\\[")
        picture.add_row(row["name"], state, str(row["attempts"]), seconds, where, row["job"] or "", reason)
    if len(rows) > limit:
        picture.add_row(f"... and {len(rows) - limit} more (--all)")
    return picture


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 3 when a task has failed or is lost."""
    return guard(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fine_dist.status", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run directory of a fan-out")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--watch", action="store_true", help="stay, and update until every task has ended")
    parser.add_argument("--all", action="store_true", help="all rows, not the most interesting 40")
    args = parser.parse_args(argv)
    rows = read(args.run_dir)
    if args.json:
        print(json.dumps({"run_dir": str(args.run_dir.absolute()), "summary": summary(rows), "tasks": rows}, indent=1))
    else:
        _show(args, rows)
        rows = read(args.run_dir)
    return EXIT_TASKS_FAILED if any(row["state"] in ("failed", "lost") for row in rows) else 0


def _show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.live import Live

    limit = sys.maxsize if args.all else 40
    if not args.watch:
        Console().print(show(rows, limit))
        return
    with Live(show(rows, limit), refresh_per_second=4) as live:
        while any(row["state"] not in ("done", "failed", "lost") for row in rows):
            time.sleep(1)
            rows = read(args.run_dir)
            live.update(show(rows, limit))


if __name__ == "__main__":
    sys.exit(main())
