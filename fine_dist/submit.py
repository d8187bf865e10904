"""The commands that the scripts in `slurm/` run.

    python -m fine_dist.submit [--spread] prepare fine_dist.condense --config FILE [--KEY VALUE ...]
    python -m fine_dist.submit spread JOB.json

`prepare` writes the job file of one job, or of every task of a fan-out, and prints the ticket that `slurm/env.sh`
sources; with `--spread` a fan-out becomes one job. `spread` runs the tasks of such a job as steps of its allocation.
"""

from __future__ import annotations

import sys

from fine_dist.core.errors import ConfigError, guard


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    one_job = "--spread" in argv[:1]
    words = argv[one_job:]
    if "-h" in words[:1] or "--help" in words[:1]:
        print(f"usage: {__doc__}")
        return 0
    from fine_dist.launchers.sbatch import prepare, spread

    if words[:1] == ["prepare"] and len(words) > 1:
        print(prepare(words[1], words[2:], one_job))
        return 0
    if words[:1] == ["spread"] and len(words) == 2:
        return spread(words[1])
    raise ConfigError(
        f"submit: {' '.join(words[:2]) or 'nothing'!r} says no job; legal: `prepare MODULE [--KEY VALUE ...]`, "
        "`spread JOB.json` (what slurm/*.sh call; `fine-dist COMMAND --launcher slurm` submits by itself)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
