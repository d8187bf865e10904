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
    args = argv[one_job:]
    if args[:1] in (["-h"], ["--help"]):
        print(f"usage: {__doc__}")
        return 0
    from fine_dist.launchers.sbatch import prepare, spread

    if args[:1] == ["prepare"] and len(args) > 1:
        print(prepare(args[1], args[2:], one_job))
        return 0
    if args[:1] == ["spread"] and len(args) == 2:
        return spread(args[1])
    raise ConfigError(
        f"submit: {' '.join(args[:2]) or 'nothing'!r} is not a job; legal: `prepare MODULE [--KEY VALUE ...]`, "
        "`spread JOB.json` (what slurm/*.sh call; `fine-dist COMMAND --launcher slurm` submits by itself)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
