"""torchrun with exit code 75 when the run was stopped early and the same command continues it.

    python -m fine_dist.launchers.torchrun --nproc-per-node 2 -m fine_dist.condense --config FILE

takes torchrun's arguments. torchrun itself ends with 1 if any of its processes fails, so that a script could not
distinguish a run that was stopped early (a file STOP, a signal, a time limit) from one that crashed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fine_dist.core.errors import EXIT_RESUME, EXIT_USER_ERROR
from fine_dist.launchers.launcher import joint_code


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments of torchrun. None: those of this process.

    Returns:
        The exit code: 0 done, 75 stopped early, 2 a user's error on a rank, else 1.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:] if argv is None else argv)
    except ChildFailedError as error:
        return exit_code([failure.exitcode for failure in error.failures.values()])
    return 0


def exit_code(codes: Sequence[int]) -> int:
    """The exit code of the command for the exit codes of the failed ranks: 75, 2, else 1."""
    # torchrun ends the remaining ranks by SIGTERM when one has failed; `joint_code` does not count these as failures.
    code = joint_code(codes)
    return code if code in (EXIT_RESUME, EXIT_USER_ERROR) else 1


if __name__ == "__main__":
    raise SystemExit(main())
