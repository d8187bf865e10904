"""`python -m fine_dist.init`: stage 2, initialise a family of targets from a learngene by training sigma alone.

python -m fine_dist.init --config FILE [--dry-run] [--launcher NAME]     train the family
python -m fine_dist.init --list RUN_DIR                                  its sizes and losses
"""

from __future__ import annotations

import contextlib
import sys
from argparse import ArgumentParser
from pathlib import Path

from fine_dist.cli import parse
from fine_dist.config import dump_yaml, expand_path
from fine_dist.errors import EXIT_TASKS_FAILED, LaunchError, guard
from fine_dist.family import Family, InitConfig, expand, run_dir_of
from fine_dist.jobs import StateTable, Task
from fine_dist.jobs.worker import inside
from fine_dist.pack.plan import activation_bytes, state_numbers

PRELOAD = ("torch", "fine_dist.family.run")
"""What a local pool imports once for all packs."""


def tasks(config: InitConfig) -> list[Task]:
    """One task a pack; its rows are its targets. Raises what is wrong with the family before anything is queued."""
    family = Family(config)
    family.check()
    # A worker keeps the jobs of its pack together; how many go through at once it decides where it runs.
    alone = config.pack.model_copy(update={"workers": 1})
    return [
        Task(pack.name, config.model_copy(update={"only": pack.jobs, "pack": alone}), pack.jobs)
        for pack in family.packs()
    ]


def run(config: InitConfig) -> Path:
    """Train the targets (`only` those named) that are not done, in this process; the family's folder.

    A target that fails is marked in the state table and does not stop the others. Raises `ResumeLater` when stopped.
    """
    from fine_dist.family.run import everyone, pack_world, run_pack
    from fine_dist.family.table import draw_family, result_of

    world = pack_world(config)
    family = Family(config)
    if not inside():
        family.check()
    folder = run_dir_of(config)
    table = StateTable(folder)
    names = [member.name for member in family.members]
    if world.is_main:
        table.add(names, {member.name: str(member.folder) for member in family.members})
    claim = None if inside() else table.claim(names)
    if claim is None and not inside():
        raise LaunchError(f"{folder}: another live process trains targets of this family; wait for it, or stop it")
    try:
        for pack in family.packs(workers=1):
            if claim is not None:
                for name in pack.jobs:
                    if result_of(folder / name) is None:
                        table.start(name)
            run_pack(family, pack, table, world)
    finally:
        if claim is not None:
            claim.release()
    if world.is_main:
        others = everyone(family)
        if all(result_of(m.folder) or ((row := table.get(m.name)) and row.state == "failed") for m in others):
            draw_family(folder, others)  # the last pack to end draws the whole family
    return folder


def dry_run(config: InitConfig) -> list[str]:
    """The resolved config, every target, and the packs they would be trained in (once there is a learngene)."""
    if config.learngene and not Path(expand_path(config.learngene)).exists():
        names = [member.name for member in expand(config)]
        return [
            dump_yaml(config).rstrip(),
            "",
            f"{len(names)} targets: {', '.join(names)}",
            f"the learngene {config.learngene} is not there yet: how targets are packed depends on its width",
            "dry run: nothing was done",
        ]
    family = Family(config)
    family.check()
    members = {member.name: member for member in family.members}
    packs = family.packs()
    lines = [dump_yaml(config).rstrip(), "", f"{len(members)} targets in {len(packs)} packs:"]
    for pack in packs:
        deepest = family.arch(members[pack.jobs[0]])
        numbers = sum(state_numbers(family.arch(members[name]), family.rank) for name in pack.jobs)
        memory = pack.chunk * config.batch * activation_bytes(deepest, family.rank) / 2**20
        lines.append(
            f"  {pack.name}: {len(pack.jobs)} targets, {pack.chunk} at once, {numbers:,} numbers of sigma train, "
            f"{pack.layer_steps:,} layer-steps, about {memory:,.0f} MiB of activations"
        )
        lines += [f"    {name}: {config.steps} steps of {config.batch} at {members[name].lr:g}" for name in pack.jobs]
    lines.append("dry run: nothing was done")
    return lines


def _bar(config: InitConfig, launcher: str) -> contextlib.AbstractContextManager[object]:
    """A bar over the whole family while other processes train it."""
    from launchers import Launcher, pick

    place = pick(launcher, config.launch)
    if inside() or place.detached or not issubclass(place, Launcher):
        return contextlib.nullcontext()
    from fine_dist.family.table import FamilyBar

    return FamilyBar(expand(config), config.steps)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def options(parser: ArgumentParser) -> None:
        parser.add_argument("--list", metavar="RUN_DIR", help="print a family's sizes and losses, and do nothing else")

    def body() -> int:
        from launchers import launch

        call = parse(InitConfig, argv, "python -m fine_dist.init", options=options)
        if call.options.list:
            from fine_dist.family.table import list_family

            print("\n".join(list_family(Path(call.options.list))))
            return 0
        if call.dry_run:
            print("\n".join(dry_run(call.config)))
            return 0
        with _bar(call.config, call.launcher):
            code = launch("fine_dist.init", call.config, call.launcher)
        if code == 0 and not inside():
            rows = StateTable(run_dir_of(call.config)).rows()
            code = EXIT_TASKS_FAILED if any(row.state == "failed" for row in rows) else 0
        return code

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
