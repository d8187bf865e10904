"""`python -m fine_dist.train`: stage 3, train an ordinary dense DiT from an initialised target, or from scratch."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import expand_path
from fine_dist.core.errors import guard
from fine_dist.engine.run_dir import promise_of
from fine_dist.model.arch import arch
from fine_dist.stages.config import PRELOAD
from fine_dist.stages.train import TrainConfig, run

FALLBACK = "DiT-B/2"
"""What a dry run counts while the parent that is to be trained does not exist yet."""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    run_dir: Path | None = None

    def body() -> int:
        nonlocal run_dir
        call = parse(TrainConfig, argv, "fine-dist train")
        config: TrainConfig = call.config
        if call.dry_run:
            from launchers.entry import check

            check("fine_dist.train", call.config, call.launcher)
            from fine_dist.planning.estimates import dry_run

            plan = config.blueprint()
            if plan is None:
                print(f"parent {config.parent} is not there yet: counts and estimates are for {FALLBACK}\n")
                plan = config.model_copy(update={"arch": arch(FALLBACK)}).blueprint()
            print("\n".join(dry_run(config, plan, call.options.device)))
            return 0
        from launchers.entry import launch

        run_dir = Path(expand_path(call.config.run_dir))
        return launch("fine_dist.train", config, call.launcher)

    return guard(body, lambda: promise_of(run_dir) if run_dir else "")


__all__ = ["PRELOAD", "TrainConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
