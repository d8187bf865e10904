"""`python -m fine_dist.status RUN_DIR`: what became of the tasks of a fan-out, or of a single run, live."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from fine_dist.core.errors import EXIT_TASKS_FAILED, guard
from launchers.status import ENDED, read, show, summary


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 3 when a task has failed or is lost."""
    return guard(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fine_dist.status", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run directory of a fan-out or of a single run")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--watch", action="store_true", help="stay, and update until every task has ended")
    parser.add_argument("--all", action="store_true", help="all rows, not the most interesting 40")
    args = parser.parse_args(argv)
    rows = read(args.run_dir)
    if args.json:
        print(json.dumps({"run_dir": str(args.run_dir.absolute()), "summary": summary(rows), "tasks": rows}, indent=1))
    else:
        rows = _show(args, rows)
    return EXIT_TASKS_FAILED if any(row["state"] in ("failed", "lost") for row in rows) else 0


def _show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
