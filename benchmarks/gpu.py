"""`python -m benchmarks gpu` (`make gpu-check`): all tests and benchmarks that need a GPU, in one command.

These are the tests marked `gpu`, and the benchmarks of steps (at two sizes) and of packs. Each runs as its public
command in a new process, so that it starts with an empty GPU, and a failure loses only its own rows. The results are
written to a JSON file with the card's name and the versions.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import BenchmarkRow, say
from fine_dist.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures" / "gpu.json"
"""Default file of the results."""
SIZES = {"DiT-XL/2": 32, "DiT-B/2": 64}
"""Batch of the timed steps, by architecture."""
TOTAL_S = 480.0
"""Seconds for all parts together, so that a job of ten minutes is enough. A part that takes longer has failed."""


@dataclass(frozen=True)
class Part:
    """One program."""

    words: Sequence[str]
    """Arguments of python, in which `{out}` stands for the file that the program writes."""
    read: Callable[[Path], list[BenchmarkRow]]
    """Makes rows of that file."""


@dataclass
class Found:
    """The results of all parts."""

    rows: list[BenchmarkRow] = field(default_factory=list)
    """Rows of all parts, in their order."""
    failed: dict[str, str] = field(default_factory=dict)
    """The reason, or the end of the output, of every part that failed."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of every part in seconds."""

    def as_json(self) -> dict[str, Any]:
        """The results and the facts about the card as JSON."""
        return {
            **card(),
            "seconds": {name: round(spent, 1) for name, spent in self.seconds.items()},
            "failed": self.failed,
            "rows": [row.as_json() for row in self.rows],
        }


def parts(quick: bool) -> dict[str, Part]:
    """All parts by name, in the order in which they run.

    Args:
        quick: Whether to time only the smaller size, and to run the benchmarks as smoke tests.

    Raises:
        ConfigError: This is not a checkout, so there are no tests.
    """
    tests = ROOT / "tests" / "gpu"
    if not tests.is_dir():
        raise ConfigError(f"the GPU's tests lie in a checkout, and {tests} is not there; run `make gpu-check` in one")
    brief = ["--quick"] if quick else []
    sizes = {"DiT-B/2": SIZES["DiT-B/2"]} if quick else SIZES
    return {
        "tests": tests_part(tests),
        **{f"speed, {arch}": benchmark_part("speed", "--arch", arch, "--batch", str(batch), *brief, about=f"{arch}: ")
           for arch, batch in sizes.items()},
        # The wall times are measured on the CPU, so --quick makes them a smoke test; the rows of the GPU are complete.
        "fanout": benchmark_part("fanout", "--quick"),
    }  # fmt: skip


def tests_part(*what: str | Path) -> Part:
    """The part that runs tests.

    Args:
        what: Arguments of pytest, such as files.
    """
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:xdist", "--junitxml", "{out}", *map(str, what)]
    return Part(words, read_tests)


def benchmark_part(name: str, *words: str, about: str = "") -> Part:
    """The part that runs a benchmark.

    Args:
        name: Name of the benchmark.
        words: Further arguments.
        about: Prefix of the rows' names.
    """
    return Part(["-m", "benchmarks", name, *words, "--json", "{out}"], lambda path: read_rows(path, about))


def require_gpu() -> None:
    """Check that torch can use a GPU.

    Raises:
        ConfigError: It cannot.
    """
    import torch

    if not torch.cuda.is_available():
        built = "with" if torch.version.cuda else "without"
        raise ConfigError(
            f"no GPU is at hand (torch {torch.__version__} is built {built} CUDA), and these figures are one's; "
            "FINE_DIST_GPU_TESTS=cpu python -m pytest -m gpu tests/gpu runs its tests on the CPU"
        )


def run(programs: Mapping[str, Part], python: str = sys.executable, total_s: float = TOTAL_S) -> Found:
    """Run all parts one after the other.

    Args:
        programs: The parts by name.
        python: The interpreter.
        total_s: Seconds for all parts together. Each part gets what is left, at least one second.
    """
    end = time.perf_counter() + total_s
    found = Found()
    with tempfile.TemporaryDirectory(prefix="fine_dist-gpu-") as folder:
        for number, (name, part) in enumerate(programs.items()):
            say(name)
            out, begun = Path(folder) / f"{number}.out", time.perf_counter()
            words = [word.replace("{out}", str(out)) for word in part.words]
            failure = _run_program([python, *words], max(1.0, end - begun))
            found.seconds[name] = time.perf_counter() - begun
            if out.exists():
                found.rows += part.read(out)
            if failure is not None:
                found.failed[name] = failure
    return found


def _run_program(command: list[str], limit_s: float) -> str | None:
    """Run a command and print its output to stderr when it has ended; returns why it failed, or None."""
    try:
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                timeout=limit_s)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it still ran when the time for all parts was over, after {limit_s:.0f} s of its own"
    print(result.stdout, file=sys.stderr, flush=True)
    if result.returncode == 0:
        return None
    return f"exit code {result.returncode}: " + "\n".join(result.stdout.strip().splitlines()[-5:])


def read_rows(path: Path, about: str) -> list[BenchmarkRow]:
    """The rows in the JSON file of a benchmark; their names get the prefix `about`."""
    rows = [BenchmarkRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    return [BenchmarkRow(**{**row.as_json(), "measure": about + row.measure}) for row in rows]


def read_tests(path: Path) -> list[BenchmarkRow]:
    """The numbers of tests that passed, failed and were skipped, from pytest's JUnit file."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    failed = counts["failures"] + counts["errors"]
    return [
        BenchmarkRow("tests on the GPU: passed", counts["tests"] - failed - counts["skipped"], "tests", 1),
        BenchmarkRow("tests on the GPU: failed", failed, "tests", 0, "lower"),
        BenchmarkRow("tests on the GPU: skipped", counts["skipped"], "tests", 0, "lower"),
    ]


def card() -> dict[str, Any]:
    """Name and memory (GiB) of the GPU, and the versions of its driver, CUDA and torch; None for what is absent."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    memory = torch.cuda.get_device_properties(0).total_memory if name else None
    return {
        "card": name,
        "card_memory_gib": round(memory / 2**30, 1) if memory else None,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def driver() -> str | None:
    """The version of NVIDIA's driver, from `nvidia-smi`; None without that program."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def markdown(rows: Sequence[BenchmarkRow]) -> str:
    """The rows as a Markdown table, for docs/engine.md."""
    lines = ["| measurement | value | target | |", "|---|---|---|---|"]
    for row in rows:
        sign = {"higher": "at least ", "lower": "at most ", "near": "within "}[row.better]
        target = "" if row.bar is None else f"{sign}{row.bar:g}"
        met = {None: "", True: "met", False: "missed"}[row.passed]
        lines.append(f"| {row.measure} | {row.value:.4g} {row.unit} | {target} | {met} |")
    return "\n".join(lines)
