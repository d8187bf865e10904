"""`python -m benchmarks gpu` (`make gpu-check`): all that only a GPU can show, in one command.

The tests marked `gpu`, then the benchmarks of steps at two sizes and of packs, each the public command in a process of
its own, so that none inherits another's memory and one that fails costs its own rows alone. What came out is written
beside the card's name and the versions.
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
SIZES = {"DiT-XL/2": 32, "DiT-B/2": 64}
"""Sizes whose steps are timed, and the batch."""
TOTAL_S = 480.0
"""Seconds of all parts together, so that ten minutes of a cluster are enough. What is not over then has failed."""


@dataclass(frozen=True)
class Part:
    """One program: `words` after `python`, in which `{out}` is the file that it writes; `read` makes rows of that."""

    words: Sequence[str]
    read: Callable[[Path], list[BenchmarkRow]]


@dataclass
class Found:
    """What all parts gave. failed: part -> the end of what it said."""

    rows: list[BenchmarkRow] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            **card(),
            "seconds": {name: round(spent, 1) for name, spent in self.seconds.items()},
            "failed": self.failed,
            "rows": [row.as_json() for row in self.rows],
        }


def parts(quick: bool) -> dict[str, Part]:
    """Everything, by name. quick: the smaller size alone, and smoke tests of the benchmarks."""
    tests = ROOT / "tests" / "gpu"
    if not tests.is_dir():
        raise ConfigError(f"the GPU's tests lie in a checkout, and {tests} is not there; run `make gpu-check` in one")
    brief = ["--quick"] if quick else []
    sizes = {"DiT-B/2": SIZES["DiT-B/2"]} if quick else SIZES
    return {
        "tests": tests_part(tests),
        **{f"speed, {arch}": benchmark_part("speed", "--arch", arch, "--batch", str(batch), *brief, about=f"{arch}: ")
           for arch, batch in sizes.items()},
        # the wall times of its whole programs are the CPU's, so they are a smoke test here; what a GPU packs is not
        "fanout": benchmark_part("fanout", "--quick"),
    }  # fmt: skip


def tests_part(*what: str | Path) -> Part:
    """Tests, by pytest's words."""
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:xdist", "--junitxml", "{out}", *map(str, what)]
    return Part(words, read_tests)


def benchmark_part(name: str, *words: str, about: str = "") -> Part:
    """A benchmark; its rows' names begin with `about`."""
    return Part(["-m", "benchmarks", name, *words, "--json", "{out}"], lambda path: read_rows(path, about))


def require_gpu() -> None:
    """`ConfigError` where there is none."""
    import torch

    if not torch.cuda.is_available():
        built = "with" if torch.version.cuda else "without"
        raise ConfigError(
            f"no GPU is at hand (torch {torch.__version__} is built {built} CUDA), and these figures are one's; "
            "FINE_DIST_GPU_TESTS=cpu python -m pytest -m gpu tests/gpu runs its tests on the CPU"
        )


def run(programs: Mapping[str, Part], python: str = sys.executable, total_s: float = TOTAL_S) -> Found:
    """Run all parts, one after the other, in `total_s` seconds together."""
    end = time.perf_counter() + total_s
    found = Found()
    with tempfile.TemporaryDirectory(prefix="fine_dist-gpu-") as folder:
        for number, (name, part) in enumerate(programs.items()):
            say(name)
            out, begun = Path(folder) / f"{number}.out", time.perf_counter()
            words = [word.replace("{out}", str(out)) for word in part.words]
            said = _end_of([python, *words], max(1.0, end - begun))
            found.seconds[name] = time.perf_counter() - begun
            if out.exists():
                found.rows += part.read(out)
            if said is not None:
                found.failed[name] = said
    return found


def _end_of(command: list[str], limit_s: float) -> str | None:
    """Run a command: none when all is well, else the end of what it said. It is heard meanwhile on stderr."""
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=limit_s)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it still ran when the time for all parts was over, after {limit_s:.0f} s of its own"
    print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode == 0:
        return None
    return f"exit code {done.returncode}: " + "\n".join(done.stdout.strip().splitlines()[-5:])


def read_rows(path: Path, about: str) -> list[BenchmarkRow]:
    """The rows that a benchmark wrote."""
    rows = [BenchmarkRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    return [BenchmarkRow(**{**row.as_json(), "measure": about + row.measure}) for row in rows]


def read_tests(path: Path) -> list[BenchmarkRow]:
    """How many tests passed and how many did not, from pytest's JUnit file."""
    counted = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        for key in counted:
            counted[key] += int(suite.get(key, 0))
    bad = counted["failures"] + counted["errors"]
    return [
        BenchmarkRow("tests on the GPU: passed", counted["tests"] - bad - counted["skipped"], "tests", 1),
        BenchmarkRow("tests on the GPU: failed", bad, "tests", 0, "lower"),
        BenchmarkRow("tests on the GPU: skipped", counted["skipped"], "tests", 0, "lower"),
    ]


def card() -> dict[str, Any]:
    """The accelerator and what drives it; none for what is not there."""
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
    """The version of NVIDIA's driver; none without its `nvidia-smi`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def markdown(rows: Sequence[BenchmarkRow]) -> str:
    """The rows as a table that can be pasted into docs/engine.md."""
    lines = ["| measurement | value | target | |", "|---|---|---|---|"]
    for row in rows:
        sign = {"higher": "at least ", "lower": "at most ", "near": "within "}[row.better]
        target = "" if row.bar is None else f"{sign}{row.bar:g}"
        met = {None: "", True: "met", False: "missed"}[row.passed]
        lines.append(f"| {row.measure} | {row.value:.4g} {row.unit} | {target} | {met} |")
    return "\n".join(lines)
