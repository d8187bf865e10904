"""One process of a job, as every launcher starts it: runs `module.run(config)` of a job file.

    python -m fine_dist.worker JOB.json          one process of a job (torchrun, srun, Ray or a pool set its rank)
    python -m fine_dist.worker --pool IN OUT     the server of a local pool, which forks one process for each job

Exit codes: 0 done, 1 crashed, 2 a user's error, 3 some tasks of a pack failed, 75 stopped early and to be started
again, 76 another live process runs this task.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fine_dist.core.errors import EXIT_RESUME, EXIT_USER_ERROR
from fine_dist.core.processes import die_with_parent
from fine_dist.launchers.worker import EXIT_FILE, PARENT_ENV, run_job


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parent = os.environ.pop(PARENT_ENV, None)
    if parent:
        die_with_parent(int(parent))
    if len(argv) == 3 and argv[0] == "--pool":
        from fine_dist.launchers.process_pool import serve

        return serve(int(argv[1]), int(argv[2]))
    if argv in (["-h"], ["--help"]):
        print(f"usage: python -m fine_dist.worker JOB.json\n\n{__doc__}")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m fine_dist.worker JOB.json", file=sys.stderr)
        return EXIT_USER_ERROR
    code = run_job(argv[0])
    exit_file = os.environ.get(EXIT_FILE)
    if code == EXIT_RESUME and exit_file:
        Path(exit_file).write_text(f"{code}\n", encoding="ascii")
        return 0
    return code


if __name__ == "__main__":
    raise SystemExit(main())
