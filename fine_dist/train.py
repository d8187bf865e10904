"""`python -m fine_dist.train`: stage 3, train an ordinary dense DiT from an initialized target, or from scratch."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import Call
from fine_dist.core.config import expand_path, run_dir_of
from fine_dist.core.errors import ConfigError, RunDirError
from fine_dist.engine.run_dir import RunDir
from fine_dist.launchers import entry
from fine_dist.launchers.spec import Task
from fine_dist.launchers.state_table import StateTable
from fine_dist.stages.settings import PRELOAD, TrainConfig

FALLBACK = "DiT-B/2"
"""Architecture that a dry run assumes while the parent does not exist yet."""


def tasks(config: TrainConfig) -> list[Task] | None:
    """One task for each target of the family `parents`; None when one model is trained.

    Raises:
        ConfigError: `parent` is given too.
        RunDirError: The folder holds no family, or no target of it is done.
    """
    if config.parents is None:
        return None
    if config.parent is not None:
        raise ConfigError(f"parents: {config.parents} and parent: {config.parent} exclude each other; give one of them")
    family = Path(expand_path(config.parents))
    rows = StateTable(family).rows()
    done = [row.name for row in rows if row.state == "done"]
    if not done:
        has = f"{len(rows)} targets, and none is done" if rows else "no family"
        raise RunDirError(f"parents: {family} holds {has}; give the run_dir of a finished `fine-dist init`")
    return [_task(config, name, family / name) for name in done]


def _task(config: TrainConfig, name: str, parent: Path) -> Task:
    run_dir = run_dir_of(config) / name
    part = config.model_copy(update={"parents": None, "parent": str(parent), "run_dir": str(run_dir)})
    facts = RunDir(run_dir).done
    steps = facts.get("steps") if facts else None
    complete = (name,) if isinstance(steps, int) and steps >= config.steps else ()
    return Task(name, part, complete=complete)


def run(config: TrainConfig) -> Path:
    """Train the model; returns its folder. Raises `ResumeLater` when stopped early."""
    from fine_dist.stages import train

    return train.run(config)


def check(config: TrainConfig) -> None:
    """Raise the errors of `run` before its first step; a parent that is not on this machine is not read."""
    from fine_dist.stages import train

    train.check(config)


def result_lines(config: TrainConfig) -> list[str]:
    """Last lines of a successful command: the next command to run."""
    run_dir = Path(config.run_dir)
    return [f"next: fine-dist sample --model {run_dir if config.parents else run_dir / 'model'}"]


def dry_run(call: Call) -> list[str]:
    """The resolved config, counts and estimates; of a family, those of one of its tasks."""
    from fine_dist.planning import estimates
    from fine_dist.stages.train import TrainStage

    entry.check("fine_dist.train", call.config, call.launcher)
    config, lines = call.config, []
    if family := tasks(config):
        config = family[0].config
        lines.append(f"one task for each of {call.config.parents}; the estimates below are for {family[0].name}\n")
    stage = TrainStage(config)
    plan = stage.blueprint()
    if plan is None:
        lines.append(f"parent {config.parent} does not exist yet: counts and estimates are for {FALLBACK}\n")
        plan = stage.of_shape(FALLBACK).blueprint()
    return [*lines, *estimates.dry_run(stage.config, plan, call.options.device)]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return entry.run_command("fine_dist.train", TrainConfig, argv, dry_run)


__all__ = ["PRELOAD", "TrainConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
