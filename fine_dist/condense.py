"""`python -m fine_dist.condense`: stage 1, train a learngene."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import Call
from fine_dist.core.callable_module import make_callable
from fine_dist.core.help import table
from fine_dist.launchers import entry
from fine_dist.methods import CONDENSING, described
from fine_dist.stages.settings import PRELOAD, CondenseConfig


def _methods() -> list[str]:
    return ["methods with a stage 1 (--method.name NAME):", *table(described(CONDENSING))]


def run(config: CondenseConfig) -> Path:
    """Train the learngene; returns its folder. Raises `ResumeLater` when stopped early."""
    from fine_dist.stages import condense

    return condense.run(config)


def check(config: CondenseConfig) -> None:
    """Raise the errors of `run` before its first step; an ancestor that is not on this machine is not read."""
    from fine_dist.stages import condense

    condense.check(config)


def result_lines(config: CondenseConfig) -> list[str]:
    """Last lines of a successful command: the next command to run."""
    shards = f" --data.shards {config.data.shards}" if config.data.shards else ""
    return [f"next: fine-dist init --parent {Path(config.run_dir) / 'learngene'}{shards}"]


def dry_run(call: Call) -> list[str]:
    """The resolved config, counts and estimates."""
    from fine_dist.planning import estimates
    from fine_dist.stages.condense import CondenseStage

    entry.check("fine_dist.condense", call.config, call.launcher)
    stage = CondenseStage(call.config)
    note = f"ancestor {stage.config.ancestor} does not exist yet: counts and estimates are for DiT-B/2\n"
    lines = estimates.dry_run(stage.config, stage.blueprint(), call.options.device)
    return lines if stage.knows_shape else [note, *lines]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return entry.run_command("fine_dist.condense", CondenseConfig, argv, dry_run, notes=_methods)


make_callable(__name__, "condense")

__all__ = ["PRELOAD", "CondenseConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
