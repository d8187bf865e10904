"""`python -m fine_dist.train`: stage 3, train an ordinary dense DiT from an initialised target, or from scratch."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import expand_path, run_dir_of
from fine_dist.core.errors import ConfigError, RunDirError, guard
from fine_dist.engine.run_dir import RunDir, promise_of
from fine_dist.launchers.spec import Task
from fine_dist.launchers.state_table import StateTable
from fine_dist.model.arch import Arch, arch
from fine_dist.stages.config import PRELOAD
from fine_dist.stages.train import TrainConfig, run

FALLBACK = "DiT-B/2"
"""What a dry run counts while the parent that is to be trained does not exist yet."""


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


def check(config: TrainConfig) -> None:
    """Raise what `run` would refuse before its first step; a parent that is not on this machine is not read."""
    from fine_dist.artifacts.locate import exists_locally
    from fine_dist.stages.checking import check_stage
    from fine_dist.stages.train import begin

    config = config.fitted()
    if config.parent and exists_locally(config.parent):
        shape = begin(config)[0].arch
        assert isinstance(shape, Arch)
        check_stage(config, "train", shape)
        return
    check_stage(config, "train", config.arch)


def result_lines(config: TrainConfig) -> list[str]:
    """What the command prints when it has succeeded: what to do next."""
    run_dir = Path(config.run_dir)
    return [f"next: fine-dist sample --model {run_dir if config.parents else run_dir / 'model'}"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    run_dir: Path | None = None

    def body() -> int:
        nonlocal run_dir
        call = parse(TrainConfig, argv, "fine-dist train")
        config: TrainConfig = call.config.fitted()
        if call.dry_run:
            from fine_dist.launchers.entry import check

            check("fine_dist.train", config, call.launcher)
            from fine_dist.planning.estimates import dry_run

            for task in tasks(config) or ():
                print(f"one task for each of {config.parents}; what follows is for {task.name}\n")
                assert isinstance(task.config, TrainConfig)
                config = task.config
                break
            plan = config.blueprint()
            if plan is None:
                print(f"parent {config.parent} is not there yet: counts and estimates are for {FALLBACK}\n")
                plan = config.model_copy(update={"arch": arch(FALLBACK)}).blueprint()
            print("\n".join(dry_run(config, plan, call.options.device)))
            return 0
        from fine_dist.launchers.entry import launch

        run_dir = Path(expand_path(call.config.run_dir))
        return launch("fine_dist.train", config, call.launcher)

    return guard(body, lambda: promise_of(run_dir) if run_dir else "")


__all__ = ["PRELOAD", "TrainConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
