"""Check whether a job can work before it is submitted: `fine-dist plan --config FILE --launcher slurm`.

It checks accelerators, memory, steps and hours, the number of shards and ranks, disk, shared storage and the limits of
the scheduler. Every submission makes the same checks and refuses a job that cannot work, with the remedy.

With `--scale 8 64 512` it predicts instead the time of a step on that many processes under each stage of ZeRO, from the
timed parts of a step on this machine's device and from stated or measured bandwidths.
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
from fine_dist.launchers.preflight import check_job, check_upload
from fine_dist.launchers.prepare import launch_of, make_spec, tasks_of
from fine_dist.launchers.registry import pick
from fine_dist.launchers.spec import Finding
from fine_dist.launchers.worker import config_class, import_module
from fine_dist.planning.scaling_model import Link, Network, ScalingRequest

log = logging.getLogger(__name__)

STAGES = ("encode", "condense", "init", "creative", "train", "evaluate", "sample")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 when the job cannot work."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    parser = FlagParser("fine-dist plan")
    parser.add_argument("--stage", metavar="NAME", help=f"command that the config is for: {', '.join(STAGES)} "
                        "(default: derived from the config)")  # fmt: skip
    parser.add_argument("--rate", type=float, help="updates per second, if no earlier run here has measured them")
    parser.add_argument("--json", action="store_true", help="print the findings, or the predictions, as JSON")
    logs.add_flags(parser)
    scales = "--scale" in argv
    if scales or not argv or "--help-all" in argv:
        _add_scale_flags(parser)
    elif flags := [flag for flag in ONLY_WITH_SCALE if flag in argv]:
        raise ConfigError(f"{flags[0]}: needs --scale P, the number of processes to predict for")
    parser.exit_if_help(argv or ["--help"], USAGE, " ".join((__doc__ or "").split()) + MORE)
    options, rest = parser.parse_known_args(argv)
    logs.configure(options)
    module = _module(options.stage, rest)
    call = parse(config_class(import_module(module)), rest, f"fine-dist {module.rpartition('.')[2]}")
    if scales:
        return _scale(call.config, options)
    results = findings(module, call, options.rate, call.options.device)
    if options.json:
        print(json.dumps([finding._asdict() for finding in results], indent=1))
    else:
        print("\n".join(f"{finding.level:5} {finding.what:8} {finding.text}" for finding in results))
    if any(finding.level == "stop" for finding in results):
        return EXIT_USER_ERROR
    if not options.json:
        print(f"next: fine-dist {module.rpartition('.')[2]} with the same flags")
    return 0


USAGE = "[--stage NAME] [--config FILE] [--launcher NAME] [--KEY VALUE ...]"
MORE = (
    " The settings are those of the planned command, with its flags --config, --launcher and --KEY VALUE; "
    "--help-all also lists the flags that go with --scale."
)
ONLY_WITH_SCALE = ("--zero", "--hold", "--per-node", "--bandwidth", "--latency", "--overlap", "--cores", "--gloo",
                    "--parts")  # fmt: skip


def _add_scale_flags(parser: FlagParser) -> None:
    defaults = ScalingRequest(())
    add = parser.add_argument
    add("--scale", metavar="P", nargs="+", type=int, help="predict the time of a step on this many processes (one or "
        "more numbers), for a stage that trains one model")  # fmt: skip
    add("--zero", metavar="STAGE", nargs="+", type=lambda text: int(text) if text.isdecimal() else text,
        default=defaults.stages, help="stages of ZeRO, or fsdp2 (default: 0 1 2 3 fsdp2)")  # fmt: skip
    add("--hold", choices=("process", "batch"), default=defaults.hold,
        help="what stays constant: the batch per process (default), or the whole batch")  # fmt: skip
    add("--per-node", metavar="N", type=int, default=defaults.per_node, help="processes per node (default: 8)")
    add("--bandwidth", metavar="GB/S", nargs=2, type=float, default=defaults.gigabytes_per_s,
        help="GB/s per process inside a node, and between nodes (default: 150 25)")  # fmt: skip
    add("--latency", metavar="US", nargs=2, type=float, default=defaults.microseconds,
        help="microseconds of a hop inside a node, and between nodes (default: 5 15)")  # fmt: skip
    add("--overlap", metavar="SHARE", type=float, default=defaults.overlap,
        help="share of a pass that ZeRO communication may overlap (default: 0)")  # fmt: skip
    add("--cores", metavar="N", type=int,
        help="cores of a node that its processes share (default: each has its own device)")  # fmt: skip
    add("--gloo", action="store_true", help="measure bandwidths and shared cores with local gloo processes instead")
    add("--parts", metavar="FILE", help="the parts of a step from an earlier --json, such as one of a GPU node")
    add("--out", metavar="FILE", help="also draw the curves: a .png, .svg or .pdf")


def _scale(config: Config, options: Namespace) -> int:
    from fine_dist.planning.scaling import predict_scaling
    from fine_dist.planning.scaling_table import check_figure_path, curve, draw, lines

    request = ScalingRequest(
        tuple(sorted(options.scale)), tuple(options.zero), options.hold, options.per_node, tuple(options.bandwidth),
        tuple(options.latency), options.overlap, options.cores, options.gloo,
    )  # fmt: skip
    request.check()
    if options.out:
        check_figure_path(options.out)
    prediction = predict_scaling(config, request, options.parts, _gloo() if request.gloo else None)
    if options.json:
        print(json.dumps(prediction.as_json(), indent=1))
    else:
        print("\n".join([*prediction.notes, "", *lines(prediction.series), "", *curve(prediction.series)]))
    if options.out:
        log.info("drawn in %s", draw(prediction.series, options.out, prediction.notes[0].partition(";")[0]))
    return 0


def _gloo() -> Callable[[int], tuple[Network, float]]:
    """A function that measures the network between local gloo processes, and the slowdown of each by the others."""
    from fine_dist.planning.rank_timing import as_links, measure
    from fine_dist.testing import run_distributed

    def timings(processes: int) -> dict[str, Any]:
        first_rank: dict[str, Any] = run_distributed(measure, processes, "", 1, 0, ())[0]
        return first_rank

    single_process_s = timings(1)["kernel_s"]

    def network_of(processes: int) -> tuple[Network, float]:
        times = timings(processes)
        links = as_links(times["links"])
        link = links.get("all_reduce", Link(1e9, 0.0))
        return Network(link, link, processes, links, grouped=False), max(1.0, times["kernel_s"] / single_process_s)

    return network_of


def findings(module: str, call: Call, rate: float | None = None, device: str | None = None) -> list[Finding]:
    """Check a command before it runs; of a fan-out, the first task is checked.

    Args:
        module: Importable name of the stage's module.
        call: Its parsed command line.
        rate: Updates per second, if stated.
        device: Value of `--for`: check for machines with this device, without asking the launcher.
    """
    from fine_dist.planning.devices import device_for  # needs torch

    needs = launch_of(call.config)
    assumed = device_for(device, needs, getattr(call.config, "engine", None)) if device else None
    with pick("local" if assumed else call.launcher, needs)(needs) as runner:
        command_spec = make_spec(module, call.config, write=False)
        capacity = runner.capacity(command_spec) if isinstance(runner, Launcher) else None
        tasks = tasks_of(module, call.config, capacity)
        config = tasks[0].config if tasks else call.config
        spec = make_spec(module, config, write=False)
        results = check_job(module, config, spec, runner, many=bool(tasks), rate=rate, device=assumed)
    results.append(check_upload(module))
    if tasks:
        results.insert(0, Finding("tasks", "ok", f"{len(tasks)} tasks; the findings below are for one of them"))
    return results


def _module(stage: str | None, argv: list[str]) -> str:
    """The command's module: as given, from the config's path (configs/condense/), or the only one that fits."""
    if stage:
        return stage if "." in stage else f"fine_dist.{stage}"
    path = Path(argv[argv.index("--config") + 1]) if "--config" in argv[:-1] else Path()
    for name in (path.parent.name, path.stem):
        if name in STAGES:
            return f"fine_dist.{name}"
    matches = []
    for name in STAGES if path.is_file() else ():
        try:
            load(config_class(import_module(f"fine_dist.{name}")), path)
        except FineDistError:
            continue
        matches.append(f"fine_dist.{name}")
    if len(matches) == 1:
        return matches[0]
    raise ConfigError(f"--stage: which command is {path or 'this'} for? legal: {', '.join(STAGES)}")


if __name__ == "__main__":
    sys.exit(main())
