"""torchrun with exit code 75 when the run was stopped early and the same command continues it.

    python -m fine_dist.launchers.torchrun --nproc-per-node 2 -m fine_dist.condense --config FILE

takes torchrun's arguments. torchrun itself ends with 1 whatever its processes end with: a script could not tell a run
that was told to stop (a file STOP, a signal, a time limit) from one that crashed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fine_dist.core.errors import EXIT_RESUME, EXIT_USER_ERROR
from fine_dist.launchers.launcher import joint_code


def main(argv: list[str] | None = None) -> int:
    """The command: 0 done, 75 to be continued, 2 a user's error on a rank, else 1."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:] if argv is None else argv)
    except ChildFailedError as error:
        return exit_code([failure.exitcode for failure in error.failures.values()])
    return 0


def exit_code(codes: Sequence[int]) -> int:
    """What the exit codes of failed ranks mean to a script: 75, 2, else 1."""
    # torchrun ends the remaining ranks by SIGTERM when one has failed, and those are no failures of their own.
    code = joint_code(codes)
    return code if code in (EXIT_RESUME, EXIT_USER_ERROR) else 1


if __name__ == "__main__":
    raise SystemExit(main())
