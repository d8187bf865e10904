"""`python -m benchmarks fanout`: many targets at once, against one after the other.

Whole runs of the command (start-up, data, artifacts, logs and all), by turns, for the wall time; single steps, taken in
turn in one process, for the curve over jobs and batch; fresh processes for memory. What a step takes does not depend on
what the factors have learned, so the learngene has the demo's shape and no training.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rows import BenchmarkRow, interleaved, median, median_of_ratios, say, seconds
from benchmarks.timing import wall_times
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.methods import CONDENSES
from fine_dist.model.arch import Arch
from fine_dist.model.arch import arch as named

if TYPE_CHECKING:
    import torch

    from fine_dist.family.pack_loop import PackRun
    from fine_dist.model.artifact import Artifact

DEMO = Arch(
    hidden_size=64, num_layers=8, num_heads=4, patch_size=2, in_channels=1, input_size=8, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
DEPTHS, SEEDS = (2, 4, 6, 8), (0, 1, 2)
"""The family whose wall time is measured: 12 targets."""


def run(quick: bool) -> list[BenchmarkRow]:
    """All rows; `quick` takes few steps and its wall times are a smoke test."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="fine_dist-bench-") as folder:
        root = Path(folder)
        learngene = _prepare(root)
        rows = []
        for batch, steps, against_separate, against_turns in ((64, 120, 0.70, 0.60), (16, 60, 0.5, 0.5)):
            if batch == 64 or not quick:
                bars = (None, None) if quick else (against_separate, against_turns)
                rows += _wall_times(root, batch, 4 if quick else steps, bars, SEEDS[:1] if quick else SEEDS)
        rows += _curve(root, learngene, torch.device("cpu"), quick)
        rows += _large(root, torch.device("cpu"), quick)
        rows += _memory(root, quick)
        rows += _artifact(root)
        if device.type == "cuda":
            rows += _gpu(root, learngene, device)
        return rows


def _prepare(root: Path) -> Artifact:
    """The digits as shards, and a learngene of the demo's shape."""
    import torch

    from fine_dist.data.encoding import run as encode
    from fine_dist.data.settings import EncodeConfig
    from fine_dist.model.artifact import load_artifact, save_artifact
    from fine_dist.model.factors import FactoredDiT

    encode(EncodeConfig(out=str(root / "data")))
    model = FactoredDiT(DEMO, DEMO.hidden_size, torch.Generator().manual_seed(0))
    save_artifact(
        root / "learngene", kind="learngene", method=CONDENSES.model_dump(), arch=DEMO, tensors=model.state_dict()
    )
    return load_artifact(root / "learngene")


# --- wall time of whole runs ---------------------------------------------------------------------------------------


def _wall_times(
    root: Path, batch: int, steps: int, bars: tuple[float | None, float | None], seeds: Sequence[int]
) -> list[BenchmarkRow]:
    """Wall times of the three ways, as rows.

    Args:
        bars: Required speedups of packed over separate targets, and over targets in turn.
    """

    def command(out: str, *more: str) -> list[str]:
        base = [sys.executable, "-m", "fine_dist.init", "--run-dir", str(root / f"{out} at {batch}")]
        flags = {
            "parent": root / "learngene", "batch": batch,
            "data.shards": root / "data/train", "data.held-out": root / "data/held_out",
            "optim.lr": 0.03, "steps": steps, "engine.device": "cpu", "engine.log-every": 10,
        }  # fmt: skip
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        return [*base, *words, "--depths", *map(str, DEPTHS), "--seeds", *map(str, seeds), *more]

    cores = len(os.sched_getaffinity(0))
    names = root / "names"
    names.write_text("".join(f"L{depth}-s{seed}-lr0.03\n" for depth in DEPTHS for seed in seeds))
    two = ["xargs", "-a", str(names), "-P", "2", "-n", "1"]
    programs = {
        "packed": command("packed", "--launcher", "local"),
        "separate": [*two, *command("separate", "--launcher", "here", "--only")],
        # Threads that wait for each other lose on a busy machine what they win on a quiet one: the better of both.
        **{f"in turn {n}": command(f"turn{n}", "--launcher", "here", "--pack.max-jobs", "1") for n in {1, cores}},
    }
    threads = {name: {"OMP_NUM_THREADS": name.split()[-1] if "turn" in name else "1"} for name in programs}
    count = len(DEPTHS) * len(seeds)
    say(f"{steps} steps of {count} targets at batch {batch}: packed, as separate processes, in turn")
    took = wall_times(programs, threads)
    packed_s, separate_s = took["packed"], took["separate"]
    in_turn_s = min(spent for name, spent in took.items() if "turn" in name)
    at = f"batch {batch}: "
    return [
        BenchmarkRow(f"{at}{count} targets, {steps} steps: packed, {cores} workers", packed_s, "s"),
        BenchmarkRow(f"{at}separate processes, two at a time", separate_s, "s"),
        BenchmarkRow(f"{at}one process, one target after the other", in_turn_s, "s"),
        BenchmarkRow(f"{at}packed / separate", packed_s / separate_s, "x", bars[0], "lower"),
        BenchmarkRow(f"{at}packed / in turn", packed_s / in_turn_s, "x", bars[1], "lower"),
    ]


# --- a step ---------------------------------------------------------------------------------------------------------


class _Silent:
    """Nobody is told anything."""

    def row(self, job: int, step: int, values: dict[str, float]) -> None: ...

    def evaluate(self, job: int, step: int) -> None: ...

    def ended(self, job: int, progress: object) -> None: ...

    def after_step(self, progress: object) -> None: ...


def _pack(
    root: Path, learngene: Artifact, depths: Sequence[int], batch: int, device: torch.device, precision: str = "fp32"
) -> PackRun:
    """A pack on the digits, four jobs of a seed as in a family, in chunks as the planner has them."""
    from fine_dist.artifacts.targets import descend
    from fine_dist.engine.world import World
    from fine_dist.family.pack_job import PackJob
    from fine_dist.family.pack_loop import PackRun
    from fine_dist.family.pack_model import PackedDiT
    from fine_dist.family.packing import sample_bytes
    from fine_dist.methods import from_manifest, parent_of

    method = from_manifest(learngene.method)
    parent = parent_of(learngene)
    made = (descend(method, parent, learngene.arch.with_depth(d), s).model for s, d in enumerate(depths))
    forms = [form for model in made if (form := method.pack(model))]
    data = DataConfig(shards=str(root / "data/train"))
    jobs = [PackJob(f"{j}", "", "digits", data, 10, j // len(DEPTHS), 1e-3, 10**9) for j in range(len(depths))]
    arch = learngene.arch.with_depth(max(depths))
    size = sample_bytes(arch, forms[0].rank, bf16=precision == "bf16")
    return PackRun(
        PackedDiT(forms).to(device),
        jobs,
        batch=batch,
        optim=OptimConfig(),
        diffusion=DiffusionConfig(),
        engine=EngineConfig(precision=precision, log_every=10**9, checkpoint_every=10**9),
        observer=_Silent(),
        world=World(device=device),
        chunk=_chunk(arch, size, len(depths), batch, device),
    )


def _take(steps: Iterator[int], count: int, device: torch.device) -> float:
    """Seconds a step."""
    import torch

    def body() -> None:
        for _ in range(count):
            next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds(body) / count


def _ratio(root: Path, learngene: Artifact, depths: Sequence[int], batch: int, device: torch.device, count: int,
           rounds: int, precision: str = "fp32") -> tuple[float, float]:  # fmt: skip
    """(a pack's step over the sum of its solo steps, that sum in seconds)."""
    together = _pack(root, learngene, depths, batch, device, precision).steps()
    alone = [_pack(root, learngene, [depth], batch, device, precision).steps() for depth in depths]
    found = interleaved(
        {
            "pack": lambda: _take(together, count, device),
            "solo": lambda: sum(_take(one, count, device) for one in alone),
        },
        rounds,
    )
    for steps in (together, *alone):
        steps.close()  # type: ignore[attr-defined]
    return median_of_ratios(found["pack"], found["solo"]), median(found["solo"])


def _curve(root: Path, learngene: Artifact, device: torch.device, quick: bool) -> list[BenchmarkRow]:
    """Small batches gain from larger products and fewer calls, large ones from what jobs of a seed share."""
    import torch

    torch.set_num_threads(1)  # as a worker of the local pool has it
    rows = []
    for batch in (4, 64) if quick else (4, 16, 64, 256):
        for jobs in (2,) if quick else (2, 4, 12) if batch < 256 else (4,):
            say(f"steps of {jobs} jobs at batch {batch}")
            # single pairs differ by a tenth and more on a shared machine: many short ones, and their median
            count = max(1, min(4, 128 // batch))
            rows.append(_step_row(root, learngene, [DEPTHS[i % 4] for i in range(jobs)], batch, device, count,
                                  1 if quick else 9))  # fmt: skip
    return rows


def _large(root: Path, device: torch.device, quick: bool) -> list[BenchmarkRow]:
    """Width 256 and 12 layers: what a pack gains where a job's own products are large."""
    import torch

    from fine_dist.model.artifact import load_artifact, save_artifact
    from fine_dist.model.factors import FactoredDiT

    if quick:
        return []
    arch = DEMO.model_copy(update={"hidden_size": 256, "num_layers": 12})
    tensors = FactoredDiT(arch, 256, torch.Generator().manual_seed(0)).state_dict()
    save_artifact(root / "large", kind="learngene", method=CONDENSES.model_dump(), arch=arch, tensors=tensors)
    learngene, rows = load_artifact(root / "large"), []
    for batch in (4, 16):
        say(f"steps of 4 jobs of width 256 and 12 layers at batch {batch}")
        rows.append(_step_row(root, learngene, [12] * 4, batch, device, 1, 7))
    return rows


def _step_row(root: Path, learngene: Artifact, depths: Sequence[int], batch: int, device: torch.device, count: int,
              rounds: int) -> BenchmarkRow:  # fmt: skip
    """A pack's step over its jobs' own. Where the plan has jobs apart, it says what they would lose together."""
    ratio, _ = _ratio(root, learngene, depths, batch, device, count, rounds)
    what = f"step: {len(depths)} jobs of width {learngene.arch.hidden_size} at batch {batch} / sum of solo steps"
    return BenchmarkRow(what, ratio, "x", 1.0, "lower")


def _chunk(arch: Arch, size: int, jobs: int, batch: int, device: torch.device) -> int:
    """Jobs at once, as the planner has it. size: bytes of a sample."""
    from fine_dist.family.packing import Shape, chunk_size

    return chunk_size(Shape("deepest", arch, "", 1, size), jobs, batch, 4 * 2**30, cpu=device.type == "cpu")


def _gpu(root: Path, learngene: Artifact, device: torch.device) -> list[BenchmarkRow]:
    """Jobs an hour at batch 16, and where packing stops to gain."""
    rows = []
    for jobs in (2, 4, 12, 24, 48):
        depths = [DEPTHS[i % 4] for i in range(jobs)]
        for batch in (16, 64, 256):
            say(f"steps of {jobs} jobs at batch {batch} on the GPU")
            ratio, _ = _ratio(root, learngene, depths, batch, device, 10, 3)
            bar = 3.0 if jobs == 12 and batch == 16 else None
            rows.append(
                BenchmarkRow(f"GPU: jobs an hour, {jobs} at batch {batch} packed / in turn", 1 / ratio, "x", bar)
            )
    return rows


# --- memory and storage ---------------------------------------------------------------------------------------------

_MEASURE = """
import os, sys, torch
torch.set_num_threads(1)
from benchmarks import fanout
print(*fanout.memory_of(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
"""


def memory_of(jobs: int, width: int, batch: int) -> tuple[int, int, int]:
    """In a fresh process: bytes that a pack adds, that a step adds at its peak, and that a sample is planned at."""
    import torch

    from fine_dist.family.pack_model import PackedDiT, PackInputs
    from fine_dist.family.packing import sample_bytes
    from fine_dist.model.factors import FactoredDiT, SharedForm
    from fine_dist.model.roles import train_only

    arch = Arch(**{**DEMO.model_dump(), "hidden_size": width, "num_layers": 4, "input_size": 16})

    def targets() -> Iterator[SharedForm]:
        for _ in range(jobs):
            model = train_only(FactoredDiT(arch, width, torch.Generator().manual_seed(0)), "scaler")
            form = model.shared_form()
            assert form is not None  # nothing but sigma trains
            yield form

    before = _resident()
    pack = PackedDiT(targets())
    built = _resident()
    z = torch.randn(jobs, batch, *arch.latent_shape)
    t, y = torch.zeros(jobs, batch, dtype=torch.int64), torch.zeros(jobs, batch, dtype=torch.int64)
    out = pack(PackInputs(z, t, y)).square().sum()  # at its end all that the backward pass needs is kept
    kept = _resident()
    del out
    return built - before, kept - built, batch * sample_bytes(arch, width)


def _resident() -> int:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory(root: Path, quick: bool) -> list[BenchmarkRow]:
    """One model plus J batches' activations."""
    width, batch = (128, 32) if quick else (256, 32)
    # Every tensor gets a mapping of its own, so that what is freed leaves the resident set.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[int, list[int]] = {}
    for jobs in (1, 8) if quick else (1, 2, 4, 8):
        say(f"memory of {jobs} jobs")
        words = [sys.executable, "-c", _MEASURE, str(jobs), str(width), str(batch)]
        done = subprocess.run(words, env=env, check=True, capture_output=True, text=True)
        found[jobs] = [int(word) for word in done.stdout.split()]
    return [
        BenchmarkRow(
            "memory: model of a pack of 8 / of 1 (U and V once)", found[8][0] / found[1][0], "x", 1.15, "lower"
        ),
        *(
            BenchmarkRow(
                f"memory: activations of {j} jobs / {j} x those of one",
                found[j][1] / (j * found[1][1]),
                "x",
                1.15,
                "lower",
            )
            for j in sorted(set(found) - {1})
        ),
        BenchmarkRow("memory: activations measured / planned", found[8][1] / (8 * found[8][2]), "x", 1.15, "lower"),
    ]


def _artifact(root: Path) -> list[BenchmarkRow]:
    """The artifact of a DiT-B target of 12 layers: its sigma and its biases."""
    import torch

    from fine_dist.artifacts.targets import save_target
    from fine_dist.model.arch import MATRICES

    arch = named("DiT-B/2")
    sizes = {"sigma": lambda m: arch.hidden_size, "bias": lambda m: arch.matrix(m)[0]}
    own = {f"blocks.{i}.{m}.{part}": torch.randn(size(m)) for i in range(12) for m in MATRICES for part, size in sizes.items()}  # fmt: skip  # noqa: E501
    save_target(
        root / "target", method=CONDENSES.model_dump(), parent=None, arch=arch, tensors=own, names=list(own), facts={}
    )
    size = sum(file.stat().st_size for file in (root / "target").iterdir())
    return [BenchmarkRow("artifact of a DiT-B target of 12 layers", size / 2**20, "MiB", 1.0, "lower")]
