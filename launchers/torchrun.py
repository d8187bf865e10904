"""torchrun, ending with 75 when the run was stopped early and the same command continues it.

    python -m launchers.torchrun --nproc-per-node 2 -m fine_dist.condense --config FILE

takes torchrun's arguments. torchrun itself ends with 1 whatever its processes end with: a script could not tell a run
that was told to stop (a file STOP, a signal, a time limit) from one that crashed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable

from fine_dist.errors import EXIT_RESUME


def main(argv: list[str] | None = None) -> int:
    """The command: 0 done, 75 to be continued, 2 a user's error on a rank, else 1."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:] if argv is None else argv)
    except ChildFailedError as error:
        return joint_code(failure.exitcode for failure in error.failures.values())
    return 0


def joint_code(codes: Iterable[int]) -> int:
    """What the exit codes of failed ranks mean together. A rank that torchrun itself has ended, because another was
    done first, says nothing."""
    said = {code for code in codes if code != -signal.SIGTERM}
    return said.pop() if said in ({EXIT_RESUME}, {2}) else 1


if __name__ == "__main__":
    raise SystemExit(main())
