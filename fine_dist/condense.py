"""`python -m fine_dist.condense`: stage 1, train a learngene."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.callable_module import make_callable
from fine_dist.core.config import expand_path
from fine_dist.core.errors import guard
from fine_dist.core.help import table
from fine_dist.engine.run_dir import promise_of
from fine_dist.methods import CONDENSING, described
from fine_dist.stages.condense import CondenseConfig, run
from fine_dist.stages.config import PRELOAD


def _methods() -> list[str]:
    return ["methods with a stage 1 (--method.name NAME):", *table(described(CONDENSING))]


def check(config: CondenseConfig) -> None:
    """Raise what `run` would refuse before its first step; an ancestor that is not on this machine is not read."""
    from fine_dist.artifacts.locate import exists_locally
    from fine_dist.stages.checking import check_stage
    from fine_dist.stages.condense import ancestor_of

    here = not config.ancestor or exists_locally(config.ancestor)
    if here:
        config = config.fitted()
        ancestor_of(config)
    check_stage(config, "condense", config.shape if here else config.arch)


def result_lines(config: CondenseConfig) -> list[str]:
    """What the command prints when it has succeeded: what to do next."""
    shards = f" --data.shards {config.data.shards}" if config.data.shards else ""
    return [f"next: fine-dist init --parent {Path(config.run_dir) / 'learngene'}{shards}"]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    run_dir: Path | None = None

    def body() -> int:
        nonlocal run_dir
        call = parse(CondenseConfig, argv, "fine-dist condense", notes=_methods)
        config: CondenseConfig = call.config.fitted()
        if call.dry_run:
            from fine_dist.launchers.entry import check

            check("fine_dist.condense", config, call.launcher)
            from fine_dist.planning.estimates import dry_run

            if not config.knows_shape:
                print(f"ancestor {config.ancestor} is not there yet: counts and estimates are for DiT-B/2\n")
            print("\n".join(dry_run(config, config.blueprint(), call.options.device)))
            return 0
        from fine_dist.launchers.entry import launch

        run_dir = Path(expand_path(config.run_dir))
        return launch("fine_dist.condense", config, call.launcher)

    return guard(body, lambda: promise_of(run_dir) if run_dir else "")


make_callable(__name__, "condense")

__all__ = ["PRELOAD", "CondenseConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
