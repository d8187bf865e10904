"""Check whether a job can work before it is submitted: `fine-dist plan --config FILE --launcher slurm`.

Looks at accelerators, memory, steps and hours, shards against ranks, disk, shared storage, and what the scheduler would
say. Every submission does the same and refuses what cannot work, with the remedy.

With `--scale 8 64 512` it predicts instead what a step takes on so many processes, under each stage of ZeRO: from the
parts of a step on this machine's device, measured now or earlier, and from links as stated or measured.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fine_dist.core import logs
from fine_dist.core.arguments import Call, FlagParser, parse
from fine_dist.core.config import Config, load
from fine_dist.core.errors import EXIT_USER_ERROR, ConfigError, FineDistError, guard
from fine_dist.launchers.launcher import Launcher
from fine_dist.launchers.preflight import check_job, upload
from fine_dist.launchers.prepare import launch_of, make_spec, tasks_of
from fine_dist.launchers.registry import pick
from fine_dist.launchers.spec import Finding
from fine_dist.launchers.worker import config_class, import_module
from fine_dist.planning.scaling_model import Link, Network, ScalingRequest

log = logging.getLogger(__name__)

STAGES = ("encode", "condense", "init", "creative", "train", "evaluate", "sample")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit code 2 when the job cannot work."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    own = FlagParser("fine-dist plan")
    own.add_argument("--stage", metavar="NAME", help=f"command the config is for: {', '.join(STAGES)} "
                     "(default: told by the config)")  # fmt: skip
    own.add_argument("--rate", type=float, help="updates a second, where no earlier run here has measured them")
    own.add_argument("--json", action="store_true", help="print the findings, or the predictions, as JSON")
    logs.add_flags(own)
    scales = "--scale" in argv
    if scales or not argv or "--help-all" in argv:
        _add_scale(own)
    elif alone := [flag for flag in ONLY_WITH_SCALE if flag in argv]:
        raise ConfigError(f"{alone[0]}: belongs to --scale P, the number of processes to predict")
    own.answer_help(argv or ["--help"], USAGE, " ".join((__doc__ or "").split()) + MORE)
    known, rest = own.parse_known_args(argv)
    logs.configure(known)
    module = _module(known.stage, rest)
    call = parse(config_class(import_module(module)), rest, f"fine-dist {module.rpartition('.')[2]}")
    if scales:
        return _scale(call.config, known)
    found = findings(module, call, known.rate, call.options.device)
    if known.json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        print("\n".join(f"{finding.level:5} {finding.what:8} {finding.text}" for finding in found))
    if any(finding.level == "stop" for finding in found):
        return EXIT_USER_ERROR
    if not known.json:
        print(f"next: fine-dist {module.rpartition('.')[2]} with the same flags")
    return 0


USAGE = "[--stage NAME] [--config FILE] [--launcher NAME] [--KEY VALUE ...]"
MORE = (
    " The settings are those of the planned command, with its flags --config, --launcher and --KEY VALUE; "
    "--help-all also lists the flags that go with --scale."
)
ONLY_WITH_SCALE = ("--zero", "--hold", "--per-node", "--bandwidth", "--latency", "--overlap", "--cores", "--gloo",
                    "--parts")  # fmt: skip


def _add_scale(own: FlagParser) -> None:
    asked = ScalingRequest(())
    add = own.add_argument
    add("--scale", metavar="P", nargs="+", type=int, help="predict what a step takes on so many processes (several may "
        "be given), for a stage that trains one model")  # fmt: skip
    add("--zero", metavar="STAGE", nargs="+", type=lambda word: int(word) if word.isdecimal() else word,
        default=asked.stages, help="stages of ZeRO, and fsdp2 (default: 0 1 2 3 fsdp2)")  # fmt: skip
    add("--hold", choices=("process", "batch"), default=asked.hold,
        help="what stays as in the config: a process's share of the batch (default), or the whole batch")  # fmt: skip
    add("--per-node", metavar="N", type=int, default=asked.per_node, help="processes of a node (default: 8)")
    add("--bandwidth", metavar="GB/S", nargs=2, type=float, default=asked.gigabytes_per_s,
        help="GB/s of a process inside its node, and between nodes (default: 150 25)")  # fmt: skip
    add("--latency", metavar="US", nargs=2, type=float, default=asked.microseconds,
        help="microseconds of a hop inside a node, and between nodes (default: 5 15)")  # fmt: skip
    add("--overlap", metavar="SHARE", type=float, default=asked.overlap,
        help="share of a pass that ZeRO communication may overlap (default: 0)")  # fmt: skip
    add("--cores", metavar="N", type=int,
        help="cores of a node that its processes share (default: each has its own device)")  # fmt: skip
    add("--gloo", action="store_true", help="measure links and shared cores between local processes instead")
    add("--parts", metavar="FILE", help="the parts of a step from an earlier --json, such as one of a GPU node")
    add("--out", metavar="FILE", help="also draw the curves: a .png, .svg or .pdf")


def _scale(config: Config, known: Namespace) -> int:
    from fine_dist.planning.scaling import answer
    from fine_dist.planning.scaling_table import check_picture, curve, draw, lines

    asked = ScalingRequest(
        tuple(sorted(known.scale)), tuple(known.zero), known.hold, known.per_node, tuple(known.bandwidth),
        tuple(known.latency), known.overlap, known.cores, known.gloo,
    )  # fmt: skip
    asked.check()
    if known.out:
        check_picture(known.out)
    found = answer(config, asked, known.parts, _gloo() if asked.gloo else None)
    if known.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        print("\n".join([*found.words, "", *lines(found.series), "", *curve(found.series)]))
    if known.out:
        log.info("drawn in %s", draw(found.series, known.out, found.words[0].partition(";")[0]))
    return 0


def _gloo() -> Callable[[int], tuple[Network, float]]:
    """Links between local gloo processes, and how much slower each computes beside the others; measured when asked."""
    from fine_dist.planning.rank_timing import as_links, measure
    from fine_dist.testing import run_distributed

    def measured(processes: int) -> dict[str, Any]:
        found: dict[str, Any] = run_distributed(measure, processes, "", 1, 0, ())[0]
        return found

    alone = measured(1)["kernel_s"]

    def network_of(processes: int) -> tuple[Network, float]:
        found = measured(processes)
        links = as_links(found["links"])
        one = links.get("all_reduce", Link(1e9, 0.0))
        return Network(one, one, processes, links, grouped=False), max(1.0, found["kernel_s"] / alone)

    return network_of


def findings(module: str, call: Call, rate: float | None = None, device: str | None = None) -> list[Finding]:
    """Check a command before it is run; of a fan-out, one of its tasks.

    Args:
        module: Importable name of the stage's module.
        call: Its parsed command line.
        rate: Updates per second, if stated.
        device: Value of `--for`: check for machines with this device, and ask no launcher.
    """
    from fine_dist.planning.devices import device_for  # needs torch

    needs = launch_of(call.config)
    assumed = device_for(device, needs, getattr(call.config, "engine", None)) if device else None
    with pick("local" if assumed else call.launcher, needs)(needs) as runner:
        whole = make_spec(module, call.config, write=False)
        capacity = runner.capacity(whole) if isinstance(runner, Launcher) else None
        tasks = tasks_of(module, call.config, capacity)
        config = tasks[0].config if tasks else call.config
        spec = make_spec(module, config, write=False)
        found = check_job(module, config, spec, runner, many=bool(tasks), rate=rate, device=assumed)
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
