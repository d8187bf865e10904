"""`python -m fine_dist.creative`: learn a token for "creative" on the text encoders of SD3; no images are needed.

python -m fine_dist.creative --config FILE [--dry-run] [--launcher NAME]          train a token, and write report.md
python -m fine_dist.creative --evaluate FOLDER [--images FOLDER --clip FOLDER]    measure a trained token again
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import dump_yaml, run_dir_of
from fine_dist.core.errors import ConfigError, LaunchError, guard
from fine_dist.creative.config import CreativeConfig, check_folder, expand, is_single_run, packs
from fine_dist.launchers.entry import launch
from fine_dist.launchers.spec import Task
from fine_dist.launchers.state_table import StateTable
from fine_dist.launchers.worker import inside

PRELOAD = ("torch", "torch.utils.tensorboard", "fine_dist.creative.training", "transformers.models.clip.modeling_clip")
"""Modules that a local pool imports once for all packs."""


def tasks(config: CreativeConfig) -> list[Task] | None:
    """One task for each pack, with a row for each of its runs; None for a single run, which is an ordinary job."""
    if is_single_run(config):
        return None
    from fine_dist.creative.pairs import make_pairs

    make_pairs(config)  # raises errors of the word lists before a job is queued
    for run in expand(config):
        check_folder(config, run)
    pack_tasks = []
    for name, members in packs(config).items():
        names = tuple(run.name for run in members)
        pack_tasks.append(Task(name, config.model_copy(update={"only": names}), names))
    return pack_tasks


def run(config: CreativeConfig) -> Path:
    """Train the runs that are not done (with `only`, those named) in this process. `ResumeLater` when stopped."""
    from fine_dist.creative.training import train

    if is_single_run(config) or inside():
        return train(config)
    folder = run_dir_of(config)
    table = StateTable(folder)
    members = expand(config)
    table.add([run.name for run in members], {run.name: str(run.folder) for run in members})
    todo = [m.name for m in members if not ((row := table.get(m.name)) and row.state == "done")]
    claim = table.claim(todo)
    if claim is None:
        raise LaunchError(f"{folder}: another live process is training runs of this family; wait for it, or stop it")
    with claim:
        for name in todo:
            table.start(name)
        return train(config, table)


def result_lines(config: CreativeConfig) -> list[str]:
    """Lines that the command prints after success: the next command."""
    folder = run_dir_of(config) if is_single_run(config) else expand(config)[0].folder
    return [f"next: fine-dist creative --evaluate {folder}"]


def dry_run(config: CreativeConfig) -> list[str]:
    """The resolved config, the runs and how they are packed."""
    lines = [dump_yaml(config).rstrip(), ""]
    groups = packs(config)
    for name, members in groups.items():
        rows = len(members) * (2 if config.shuffled else 1)
        lines.append(f"{name}: {rows} rows of each encoder train in one batch, {config.steps} steps of {config.batch}")
        lines += [f"  {m.name}: seed {m.seed}, {m.template.adaptive!r} -> {m.template.restrictive!r}" for m in members]
    return [*lines, "dry run: nothing was done"]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def options(parser: ArgumentParser) -> None:
        parser.add_argument("--evaluate", metavar="FOLDER", help="measure the token of a run again, without training")
        parser.add_argument("--images", metavar="FOLDER", help="folder of images to score, with --evaluate and --clip")
        parser.add_argument("--clip", metavar="FOLDER", help="local folder of the CLIP model that scores them")

    def body() -> int:
        call = parse(CreativeConfig, argv, "fine-dist creative", options=options)
        chosen = call.options
        if bool(chosen.images) != bool(chosen.clip) or (chosen.images and not chosen.evaluate):
            raise ConfigError("--images and --clip need each other and --evaluate: give all three, or only --evaluate")
        if chosen.evaluate:
            from fine_dist.creative.reevaluate import evaluate_again

            print(evaluate_again(chosen.evaluate, chosen.images, chosen.clip))
            return 0
        if call.dry_run:
            print("\n".join(dry_run(call.config)))
            return 0

        return launch("fine_dist.creative.command", call.config, call.launcher)

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
