"""`python -m benchmarks NAME`: measure speed or memory on this machine and compare them with targets."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.errors import guard

if TYPE_CHECKING:
    from benchmarks.gpu import Found as GpuFound
    from benchmarks.rows import BenchmarkRow

NAMES = {
    "speed": "a training step: throughput, memory and the overhead of the loop",
    "data": "the latent stream and encoding, compared with plain webdataset and with one file per sample",
    "scale": "steps of 2 and 4 processes compared with their prediction, and bookkeeping for 10,000 targets",
    "fanout": "training many targets in one program, compared with one after the other",
    "metrics": "every image metric at 50,000 images, with its memory; the Fréchet distance compared with scipy",
    "sample": "sampling from a dense model, compared with diffusers' DiTPipeline",
    "creative": "training a CreTok token, compared with loops of textual inversion",
    "bf16": "held-out losses of bf16 runs, by the way weights and the residual stream are rounded",
    "gpu": "what only a GPU can show: its tests, steps of DiT-B/2 and DiT-XL/2, packs (make gpu-check)",
}
_PACKAGES = ("torch", "numpy", "webdataset", "diffusers", "deepspeed", "ray")
"""Packages whose versions are reported, if they are installed."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Command line. None: that of the process.

    Returns:
        The exit code: 0 if everything was measured, whether or not targets were met; 1 if a part of `gpu` failed; 2
        for a user's error, such as `gpu` without a GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(f"{name:8} {what}" for name, what in NAMES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=NAMES, help="what to measure")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the rows, the machine and the versions to FILE"
    )
    parser.add_argument("--quick", action="store_true", help="smoke test with smaller sizes and fewer rounds")
    size = parser.add_argument_group("only for speed")
    size.add_argument("--arch", metavar="NAME", help="architecture (default: DiT-S/2), such as DiT-XL/2 or DiT-B/2-L6")
    size.add_argument("--batch", metavar="N", type=_positive, help="samples per step (default: 16)")
    options = parser.parse_args(argv)
    if options.name != "speed" and (options.arch or options.batch):
        parser.error(f"{options.name}: --arch and --batch belong to the speed benchmark")
    commands = {"gpu": _gpu_check}
    return guard(lambda: commands.get(options.name, _run)(options))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _gpu_check(options: argparse.Namespace) -> int:
    from benchmarks import gpu

    gpu.require_gpu()
    return report(gpu.run(gpu.parts(options.quick)), options.json or gpu.FIGURES, options.quick)


def report(found: GpuFound, out: Path, quick: bool) -> int:
    """Print the results of `gpu` and write them to `out`; returns the exit code: 1 if a part failed, else 0."""
    about = {"benchmark": "gpu", "quick": quick, **machine(), **found.as_json()}
    show(found.rows, {**about, "seconds": round(sum(found.seconds.values()), 1)})
    from benchmarks.gpu import markdown

    print(markdown(found.rows))
    del about["machine"]  # the file is published, and the host's name is of no interest
    _write(out, about)
    for name, reason in found.failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    return 1 if found.failed else 0


def _run(options: argparse.Namespace) -> int:
    module = importlib.import_module(f"benchmarks.{options.name}")
    started = time.perf_counter()
    size = {"arch": options.arch, "batch": options.batch} if options.name == "speed" else {}
    rows: list[BenchmarkRow] = module.run(options.quick, **size)
    about = {
        "benchmark": options.name,
        "quick": options.quick,
        "seconds": round(time.perf_counter() - started, 1),
        **machine(),
    }
    show(rows, about)
    _write(options.json, {**about, "rows": [row.as_json() for row in rows]})
    return 0


def _write(path: Path | None, content: dict[str, Any]) -> None:
    from fine_dist.core.files import write_atomic

    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, indent=1) + "\n")


def show(rows: list[BenchmarkRow], about: dict[str, Any]) -> None:
    """Print the rows as a table.

    Args:
        rows: The rows.
        about: What `machine` returns, and `seconds` and `quick` of the benchmark.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("measurement", "value", "target", "")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for row in rows:
        sign = {"higher": "≥ ", "lower": "≤ ", "near": ""}[row.better]
        low = f"{_figure(2 - row.bar)} to " if row.bar is not None and row.better == "near" else ""
        bar = "" if row.bar is None else f"{sign}{low}{_figure(row.bar)}"
        mark = {None: "", True: "[green]target met[/]", False: "[red]target missed[/]"}[row.passed]
        share = "" if row.share is None else f" = {row.share:.1f}%"
        table.add_row(row.measure, f"{_figure(row.value)} {row.unit}{share}", bar, mark)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    console.print(
        f"{about['machine']}: {about['cpu']}, {about['cores']} cores, {about['gpu'] or 'no GPU'}", soft_wrap=True
    )
    console.print(f"{versions}; {about['seconds']} s" + (" (quick)" if about["quick"] else ""), soft_wrap=True)


def _figure(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.2e}"


def machine() -> dict[str, Any]:
    """Facts about this machine as JSON: its name, processor, number of usable cores, GPU, and versions of packages."""
    versions = {"python": platform.python_version()}
    for package in ("fine_dist", *_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": platform.node(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpu(),
        "versions": versions,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


if __name__ == "__main__":
    sys.exit(main())
