"""Where every launcher ends: `python -m fine_dist.worker JOB.json` runs `module.run(config)` of one job.

    python -m fine_dist.worker JOB.json          one process of a job (torchrun, srun, Ray and a pool set its rank)
    python -m fine_dist.worker --pool IN OUT     a server for `launchers.local`: one fork per job, imports paid once

Exit codes: 0 done, 1 crashed, 2 a user's error, 3 some tasks of a pack failed, 75 start it again, 76 another live
process runs this task.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fine_dist.core.errors import EXIT_RESUME, EXIT_USER_ERROR
from fine_dist.core.processes import die_with_parent
from launchers.worker import LIFELINE, NOTE, run_job


def main(argv: list[str] | None = None) -> int:
    """The command."""
    argv = sys.argv[1:] if argv is None else argv
    parent = os.environ.pop(LIFELINE, None)
    if parent:
        die_with_parent(int(parent))
    if len(argv) == 3 and argv[0] == "--pool":
        from launchers.process_pool import serve

        return serve(int(argv[1]), int(argv[2]))
    if argv in (["-h"], ["--help"]):
        print(f"usage: python -m fine_dist.worker JOB.json\n\n{__doc__}")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m fine_dist.worker JOB.json", file=sys.stderr)
        return EXIT_USER_ERROR
    code = run_job(argv[0])
    note = os.environ.get(NOTE)
    if code == EXIT_RESUME and note:
        Path(note).write_text(f"{code}\n")
        return 0
    return code


if __name__ == "__main__":
    raise SystemExit(main())
