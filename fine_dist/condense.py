"""`python -m fine_dist.condense`: stage 1, train a learngene."""

from __future__ import annotations

import sys

from fine_dist.cli import parse
from fine_dist.errors import guard
from fine_dist.stages import PRELOAD
from fine_dist.stages.condense import CondenseConfig, run


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(CondenseConfig, argv, "python -m fine_dist.condense")
        if call.dry_run:
            from launchers import check

            check("fine_dist.condense", call.config, call.launcher)
            from fine_dist.stages.estimates import dry_run

            if not call.config.knows_shape:
                print(f"ancestor {call.config.ancestor} is not there yet: counts and estimates are for DiT-B/2\n")
            print("\n".join(dry_run(call.config, call.config.blueprint())))
            return 0
        from launchers.entry import launch

        return launch("fine_dist.condense", call.config, call.launcher)

    return guard(body)


__all__ = ["PRELOAD", "CondenseConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
