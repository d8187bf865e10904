"""Show the state of the tasks of a fan-out, or of a single run: `fine-dist status RUN_DIR`.

It only reads files: it works for another user's run and on a read-only mount, and does not disturb running jobs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from fine_dist.core import logs
from fine_dist.core.arguments import FlagParser
from fine_dist.core.errors import EXIT_TASKS_FAILED, guard
from fine_dist.launchers.status import ENDED, TaskStatus, read, show, summary


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code, 3 when a task has failed or is lost."""
    return guard(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = FlagParser("fine-dist status")
    parser.add_argument("run_dir", type=Path, help="run directory of a fan-out or of a single run")
    parser.add_argument("--json", action="store_true", help="print the tasks and their counts as JSON")
    parser.add_argument("--watch", action="store_true", help="update the table until every task has ended")
    parser.add_argument(
        "--all", action="store_true", help="show all tasks (default: 40, failed and running ones first)"
    )
    logs.add_flags(parser)
    parser.exit_if_help(argv, "RUN_DIR [--json] [--watch] [--all]", " ".join((__doc__ or "").split()))
    args = parser.parse_flags(argv)
    logs.configure(args)
    rows = read(args.run_dir)
    if args.json:
        print(json.dumps({"run_dir": str(args.run_dir.absolute()), "summary": summary(rows), "tasks": rows}, indent=1))
    else:
        rows = _show(args, rows)
    return EXIT_TASKS_FAILED if any(row["state"] in ("failed", "lost") for row in rows) else 0


def _show(args: argparse.Namespace, rows: list[TaskStatus]) -> list[TaskStatus]:
    from rich.console import Console
    from rich.live import Live

    limit = sys.maxsize if args.all else 40
    if not args.watch:
        Console().print(show(rows, limit))
        return rows
    with Live(show(rows, limit), refresh_per_second=4) as live:
        while any(row["state"] not in ENDED for row in rows):
            time.sleep(1)
            rows = read(args.run_dir)
            live.update(show(rows, limit))
    return rows


if __name__ == "__main__":
    sys.exit(main())
