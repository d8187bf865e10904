"""`python -m fine_dist.init`: stage 2, initialize a family of targets from a learngene.

To train the family, or to print its sizes and losses:

    python -m fine_dist.init --config FILE [--dry-run] [--launcher NAME]
    python -m fine_dist.init --list RUN_DIR
"""

from __future__ import annotations

import contextlib
import sys
from argparse import ArgumentParser
from pathlib import Path

from fine_dist.artifacts.locate import exists_locally, is_hub_name
from fine_dist.core.arguments import parse
from fine_dist.core.config import dump_yaml, run_dir_of
from fine_dist.core.errors import EXIT_TASKS_FAILED, guard
from fine_dist.core.help import table
from fine_dist.family.config import InitConfig
from fine_dist.launchers import entry
from fine_dist.launchers.launcher import Launcher
from fine_dist.launchers.prepare import make_spec
from fine_dist.launchers.registry import pick
from fine_dist.launchers.spec import Capacity, Task
from fine_dist.launchers.state_table import StateTable
from fine_dist.launchers.worker import inside
from fine_dist.methods import described

PRELOAD = ("torch", "fine_dist.family.train_family")
"""Modules that a local pool imports once for all packs."""


def tasks(config: InitConfig, capacity: Capacity | None = None) -> list[Task]:
    """One task per pack, whose rows are its targets; errors of the family are raised before anything is queued."""
    from fine_dist.family.family_plan import Family

    family = Family(config)
    family.check()
    family.check_memory(capacity)
    # A worker trains its pack as one; how many jobs it computes at once depends on the machine where it runs.
    one_worker = config.pack.model_copy(update={"workers": 1})
    complete = {member.name for member in family.members if family.done(member)}
    return [
        Task(
            pack.name,
            config.model_copy(update={"only": pack.jobs, "pack": one_worker}),
            pack.jobs,
            tuple(name for name in pack.jobs if name in complete),
        )
        for pack in family.packs(capacity)
    ]


def run(config: InitConfig) -> Path:
    """Train the targets that are not done (with `only`, those named) in this process; returns the family's folder."""
    from fine_dist.family.family_plan import Family
    from fine_dist.family.train_family import run_family

    return run_family(Family(config), inside())


def result_lines(config: InitConfig) -> list[str]:
    """Last lines of the command: the targets by held-out loss, their folder, and the next command."""
    from fine_dist.family.members import expand
    from fine_dist.family.summary import result_lines as lines

    return lines(run_dir_of(config), [member.name for member in expand(config)])


def dry_run(config: InitConfig, capacity: Capacity | None = None) -> list[str]:
    """The resolved config, every target and, if the parent exists, the packs in which they would be trained."""
    from fine_dist.family.family_plan import Family
    from fine_dist.family.members import expand

    if config.parent and not exists_locally(config.parent) and not is_hub_name(config.parent):
        names = [member.name for member in expand(config)]
        return [
            dump_yaml(config).rstrip(),
            "",
            f"{len(names)} targets: {', '.join(names)}",
            f"the parent {config.parent} does not exist yet: how targets are packed depends on its width",
            "dry run: nothing was done",
        ]
    family = Family(config)
    family.check()
    family.check_memory(capacity)
    members = {member.name: member for member in family.members}
    bytes_of = {shape.name: shape.sample_bytes for shape in family.shapes()}
    packs = family.packs(capacity)
    lines = [dump_yaml(config).rstrip(), "", f"{len(members)} targets in {len(packs)} packs:"]
    for pack in packs:
        memory = pack.chunk * config.batch * bytes_of[pack.jobs[0]] / 2**20
        schedule = "one after the other" if pack.sequential else f"{pack.chunk} at once"
        lines.append(
            f"  {pack.name}: {len(pack.jobs)} targets, {schedule}, "
            f"{pack.layer_steps:,} layer-steps, about {memory:,.0f} MiB of activations"
        )
        lines += [f"    {name}: {config.steps} steps of {config.batch} at {members[name].lr:g}" for name in pack.jobs]
    lines.append("dry run: nothing was done")
    return lines


def capacity_of(config: InitConfig, launcher: str) -> Capacity | None:
    """The capacity of this machine for the family's packs; None where this process trains them or a cluster does."""
    target = pick(launcher, config.launch)
    if inside() or not issubclass(target, Launcher) or not target.on_this_machine:
        return None  # a dry run does not ask a cluster
    with target(config.launch) as runner:
        return runner.capacity(make_spec("fine_dist.init", config, write=False))


def _bar(config: InitConfig, launcher: str) -> contextlib.AbstractContextManager[object]:
    """A progress bar over the whole family while other processes train it."""
    from fine_dist.family.members import expand

    # Jobs of a cluster may run long after this command has ended, so they have no progress bar.
    if inside() or not issubclass(target := pick(launcher, config.launch), Launcher) or target.detached:
        return contextlib.nullcontext()
    from fine_dist.family.summary import FamilyBar

    return FamilyBar(expand(config), config.steps)


def promise_of(config: InitConfig) -> str:
    """What is done of an interrupted family, and what the same command would do."""
    rows = StateTable(run_dir_of(config)).rows()
    done = sum(row.state == "done" for row in rows)
    if not rows:
        return "nothing was started yet; the same command starts again"
    return f"{done} of {len(rows)} targets are done; the same command continues the others"


def _methods() -> list[str]:
    return ["methods (--method.name NAME; plan and --dry-run say which parents one takes):", *table(described())]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    config: InitConfig | None = None

    def options(parser: ArgumentParser) -> None:
        parser.add_argument("--list", metavar="RUN_DIR", help="print a family's sizes and losses, and do nothing else")

    def body() -> int:
        nonlocal config

        call = parse(InitConfig, argv, "fine-dist init", notes=_methods, options=options)
        if call.options.list:
            from fine_dist.family.summary import list_family

            print("\n".join(list_family(Path(call.options.list))))
            return 0
        if call.dry_run:
            entry.check("fine_dist.init", call.config, call.launcher)
            print("\n".join(dry_run(call.config, capacity_of(call.config, call.launcher))))
            return 0
        config = call.config
        with _bar(call.config, call.launcher):
            code = entry.launch("fine_dist.init", call.config, call.launcher)
        if code == 0 and not inside():
            rows = StateTable(run_dir_of(call.config)).rows()
            code = EXIT_TASKS_FAILED if any(row.state == "failed" for row in rows) else 0
        return code

    return guard(body, lambda: promise_of(config) if config else "")


if __name__ == "__main__":
    sys.exit(main())
