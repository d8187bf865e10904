"""`python -m fine_dist.study --config FILE`: run a study, measure it and report it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fine_dist.core.arguments import parse
from fine_dist.core.errors import ConfigError, guard
from fine_dist.core.files import write_atomic
from fine_dist.core.logs import duration
from fine_dist.study.study_file import StudyFile, template


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return guard(lambda: _run(argv))


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--template", metavar="FILE", help="write an example of the short form to FILE and stop")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="override a setting of every study in the file, by dotted key: --set steps.N=200 --set seeds=[0]",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="smoke test: smaller sizes, as the file's quick_settings say"
    )
    parser.add_argument("--no-tables", action="store_true", help="write the reports without printing their tables")


def _run(argv: list[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--template" in arguments:  # before the settings are read, because there is no file yet
        return _write_template(arguments)
    call = parse(StudyFile, argv, "fine-dist study", options=_options)
    # planning a study builds its models on the meta device: torch is needed from here on
    from fine_dist.study.budget import measured_gflops
    from fine_dist.study.running import describe, run_studies
    from fine_dist.study.short_form import hours_of, keep_plan, plans_steps, shape_of, studies_of

    options: Any = call.options
    file: StudyFile = call.config
    gflops = measured_gflops(shape_of(file), file.batch) if file.data and not file.launch.gpus else None
    studies = studies_of(file, options.config or "FILE", options.set, options.quick, gflops)
    planned = []
    if plans_steps(file, options.set):
        estimate = duration(3600 * hours_of(studies["study"], gflops))
        planned = [f"study: {estimate} in all by estimate, with measuring and reserve, for a budget of {file.budget}"]
    if call.dry_run:
        print("\n".join([*describe(studies, gflops), *planned, "dry run: nothing was done"]))
        return 0
    if planned:
        keep_plan(studies["study"], file)
    if file.data:
        print("\n".join([*describe(studies, gflops, runs=False), *planned]), flush=True)
    run_studies(studies, call.launcher, echo=not options.no_tables)
    return 0


def _write_template(arguments: list[str]) -> int:
    index = arguments.index("--template") + 1
    if index >= len(arguments):
        raise ConfigError("command line: --template: give a file name after it")
    path = Path(arguments[index])
    if path.exists():
        raise ConfigError(f"--template {path}: the file exists already; give another name")
    write_atomic(path, template())
    print(f"{path}: edit it, then run: python -m fine_dist.study --config {path} --dry-run")
    return 0
