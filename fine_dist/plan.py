"""`python -m fine_dist.plan --config FILE --launcher slurm`: whether a job can work, before it is submitted.

Looks at accelerators, memory, steps and hours, shards against ranks, disk, shared storage, and what the scheduler would
say. Every submission does the same and refuses what cannot work, with the remedy.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from fine_dist.cli import Call, parse
from fine_dist.config import load
from fine_dist.errors import EXIT_USER_ERROR, ConfigError, FineDistError, guard
from fine_dist.jobs import Finding
from fine_dist.jobs.prepare import launch_of, make_spec, tasks_of
from fine_dist.jobs.worker import config_class, import_module

STAGES = ("encode", "condense", "init", "creative", "train", "evaluate", "sample")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 2 when the job cannot work."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    own = ArgumentParser(prog="python -m fine_dist.plan", description=__doc__, add_help=False)
    own.add_argument(
        "--stage", help=f"which command the config is for ({', '.join(STAGES)}; default: tell by the config)"
    )
    own.add_argument("--rate", type=float, help="updates a second, when no earlier run here has measured them")
    own.add_argument("--json", action="store_true", help="print the findings as JSON")
    known, rest = own.parse_known_args(argv)
    if "-h" in rest or "--help" in rest or not rest:
        print(own.format_help() + "\nand the flags of that command: --config FILE --launcher NAME --KEY.KEY VALUE ...")
        return 0
    module = _module(known.stage, rest)
    call = parse(config_class(import_module(module)), rest, "python -m fine_dist.plan")
    found = findings(module, call, known.rate)
    if known.json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        print("\n".join(f"{finding.level:5} {finding.what:8} {finding.text}" for finding in found))
    return EXIT_USER_ERROR if any(finding.level == "stop" for finding in found) else 0


def findings(module: str, call: Call, rate: float | None) -> list[Finding]:
    """What is known of a call before it is made: of one of its tasks, when it has several."""
    from fine_dist.stages.preflight import preflight, upload
    from launchers import Launcher, pick

    place = pick(call.launcher, launch_of(call.config))
    with place(launch_of(call.config)) as runner:
        whole = make_spec(module, call.config, write=False)
        room = runner.room(whole) if isinstance(runner, Launcher) else None
        tasks = tasks_of(module, call.config, room)
        config = tasks[0].config if tasks else call.config
        spec = make_spec(module, config, write=False)
        if isinstance(runner, Launcher):
            room = runner.room(spec, bool(tasks))
        found = [*preflight(module, config, spec, room=room, rate=rate), *runner.findings(spec, bool(tasks))]
    found.append(upload(module))
    if tasks:
        found.insert(0, Finding("tasks", "ok", f"{len(tasks)} tasks; what follows is for one of them"))
    return found


def _module(stage: str | None, argv: list[str]) -> str:
    """The command's module: as said, by the config's place (configs/condense/x.yaml), or the one that accepts it."""
    if stage:
        return stage if "." in stage else f"fine_dist.{stage}"
    path = Path(argv[argv.index("--config") + 1]) if "--config" in argv[:-1] else Path()
    for word in (path.parent.name, path.stem):
        if word in STAGES:
            return f"fine_dist.{word}"
    fitting = []
    for name in STAGES if path.is_file() else ():
        try:
            load(config_class(import_module(f"fine_dist.{name}")), path)
        except FineDistError:
            continue
        fitting.append(f"fine_dist.{name}")
    if len(fitting) == 1:
        return fitting[0]
    raise ConfigError(f"--stage: which command is {path or 'this'} for? legal: {', '.join(STAGES)}")


if __name__ == "__main__":
    sys.exit(main())
