"""`python -m benchmarks fanout`: training many targets in one program, compared with one after the other.

The wall time is that of complete commands, from start-up to artifacts, which run alternately. The curve over jobs and
batch is of single steps in one process, and memory is measured in new processes (`pack_memory`). The learngene has the
demo's shape and random weights, because the time of a step does not depend on the values of the factors.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.pack_memory import memory_rows
from benchmarks.rows import BenchmarkRow, interleaved, median_of_ratios, say, seconds
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
    """All rows.

    Args:
        quick: Whether to take few steps; the wall times are then a smoke test and have no targets.
    """
    import torch

    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="fine_dist-bench-") as folder:
        root = Path(folder)
        learngene = _prepare(root)
        if quick:
            rows = _wall_times(root, 64, 4, (None, None), SEEDS[:1])
        else:
            rows = [
                *_wall_times(root, 64, 120, (0.70, 0.60), SEEDS),
                *_wall_times(root, 16, 60, (0.5, 0.5), SEEDS),
            ]
        rows += _curve(root, learngene, cpu, quick)
        if not quick:
            rows += _large(root, cpu)
        rows += memory_rows(quick)
        rows += _artifact(root)
        if torch.cuda.is_available():
            rows += _gpu(root, learngene, torch.device("cuda"))
        return rows


def _prepare(root: Path) -> Artifact:
    """Write the digits as shards; returns a learngene of the demo's shape."""
    from fine_dist.data.encoding import run as encode
    from fine_dist.data.settings import EncodeConfig

    encode(EncodeConfig(out=str(root / "data")))
    return _random_learngene(root / "learngene", DEMO)


def _random_learngene(folder: Path, arch: Arch) -> Artifact:
    """A learngene of full rank with random weights, stored in `folder`."""
    import torch

    from fine_dist.model.artifact import load_artifact, save_artifact
    from fine_dist.model.factors import FactoredDiT

    tensors = FactoredDiT(arch, arch.hidden_size, torch.Generator().manual_seed(0)).state_dict()
    save_artifact(folder, kind="learngene", method=CONDENSES.model_dump(), arch=arch, tensors=tensors)
    return load_artifact(folder)


# --- wall time of whole runs ---------------------------------------------------------------------------------------


def _wall_times(
    root: Path, batch: int, steps: int, bars: tuple[float | None, float | None], seeds: Sequence[int]
) -> list[BenchmarkRow]:
    """Wall times of training a family packed, in separate processes, and in one process one after the other.

    Args:
        root: Folder with the results of `_prepare`.
        batch: Samples in an update of one target.
        steps: Updates of each target.
        bars: Targets of the packed time over the separate one, and over the one in turn.
        seeds: Seeds of the family.
    """

    def command(out: str, *more: str) -> list[str]:
        base = [sys.executable, "-m", "fine_dist.init", "--run-dir", str(root / f"{out} at {batch}")]
        flags = {
            "parent": root / "learngene", "batch": batch,
            "data.shards": root / "data/train", "data.held-out": root / "data/held_out",
            "optim.lr": 0.03, "steps": steps, "engine.device": "cpu", "engine.log-every": 10,
        }  # fmt: skip
        arguments = [argument for key, value in flags.items() for argument in (f"--{key}", str(value))]
        return [*base, *arguments, "--depths", *map(str, DEPTHS), "--seeds", *map(str, seeds), *more]

    cores = len(os.sched_getaffinity(0))
    names = root / "names"
    names.write_text("".join(f"L{depth}-s{seed}-lr0.03\n" for depth in DEPTHS for seed in seeds))
    # xargs appends one name to the command, which therefore ends with `--only`, and runs two commands at a time.
    two_at_a_time = ["xargs", "-a", str(names), "-P", "2", "-n", "1"]
    programs = {
        "packed": command("packed", "--launcher", "local"),
        "separate": [*two_at_a_time, *command("separate", "--launcher", "here", "--only")],
        # With one thread and with all: several threads are faster on an idle machine and slower on a busy one.
        **{f"in turn {n}": command(f"turn{n}", "--launcher", "here", "--pack.max-jobs", "1") for n in {1, cores}},
    }
    threads = {name: {"OMP_NUM_THREADS": name.split()[-1] if "turn" in name else "1"} for name in programs}
    count = len(DEPTHS) * len(seeds)
    say(f"{steps} steps of {count} targets at batch {batch}: packed, as separate processes, in turn")
    times = wall_times(programs, threads)
    packed_s, separate_s = times["packed"], times["separate"]
    in_turn_s = min(time_s for name, time_s in times.items() if "turn" in name)
    prefix = f"batch {batch}: "
    return [
        BenchmarkRow(f"{prefix}{count} targets, {steps} steps: packed, {cores} workers", packed_s, "s"),
        BenchmarkRow(f"{prefix}separate processes, two at a time", separate_s, "s"),
        BenchmarkRow(f"{prefix}one process, one target after the other", in_turn_s, "s"),
        BenchmarkRow(f"{prefix}packed / separate", packed_s / separate_s, "x", bars[0], "lower"),
        BenchmarkRow(f"{prefix}packed / in turn", packed_s / in_turn_s, "x", bars[1], "lower"),
    ]


# --- a step ---------------------------------------------------------------------------------------------------------


class _Silent:
    """An observer of a pack that does nothing."""

    def row(self, job: int, step: int, values: dict[str, float]) -> None: ...

    def evaluate(self, job: int, step: int) -> None: ...

    def ended(self, job: int, progress: object) -> None: ...

    def after_step(self, progress: object) -> None: ...


def _pack(
    root: Path, learngene: Artifact, depths: Sequence[int], batch: int, device: torch.device, precision: str = "fp32"
) -> PackRun:
    """A pack that trains on the digits, four jobs of each seed as in the family, with the planner's chunk size."""
    from fine_dist.artifacts.targets import descend
    from fine_dist.engine.world import World
    from fine_dist.family.pack_job import PackJob
    from fine_dist.family.pack_loop import PackRun
    from fine_dist.family.pack_model import PackedDiT
    from fine_dist.family.packing import sample_bytes
    from fine_dist.methods import from_manifest, parent_of

    method = from_manifest(learngene.method)
    parent = parent_of(learngene)
    models = (descend(method, parent, learngene.arch.with_depth(d), s).model for s, d in enumerate(depths))
    forms = [form for model in models if (form := method.pack(model))]
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


def _step_seconds(steps: Iterator[int], count: int, device: torch.device) -> float:
    """Mean seconds of the next `count` steps."""
    import torch

    def body() -> None:
        for _ in range(count):
            next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds(body) / count


def _chunk(arch: Arch, size: int, jobs: int, batch: int, device: torch.device) -> int:
    """Number of jobs that go through the model at once by the planner's rule. size: bytes of a sample."""
    from fine_dist.family.packing import Shape, chunk_size

    return chunk_size(Shape("deepest", arch, "", 1, size), jobs, batch, 4 * 2**30, cpu=device.type == "cpu")


def _ratio(root: Path, learngene: Artifact, depths: Sequence[int], batch: int, device: torch.device, count: int,
           rounds: int, precision: str = "fp32") -> float:  # fmt: skip
    """Seconds of a pack's step over the sum of its jobs' steps in packs of one; `count` steps in each of the rounds."""
    together = _pack(root, learngene, depths, batch, device, precision).steps()
    separate = [_pack(root, learngene, [depth], batch, device, precision).steps() for depth in depths]
    times = interleaved(
        {
            "pack": lambda: _step_seconds(together, count, device),
            "solo": lambda: sum(_step_seconds(steps, count, device) for steps in separate),
        },
        rounds,
    )
    for steps in (together, *separate):
        steps.close()  # type: ignore[attr-defined]
    return median_of_ratios(times["pack"], times["solo"])


def _step_row(root: Path, learngene: Artifact, depths: Sequence[int], batch: int, device: torch.device, count: int,
              rounds: int) -> BenchmarkRow:  # fmt: skip
    ratio = _ratio(root, learngene, depths, batch, device, count, rounds)
    what = f"step: {len(depths)} jobs of width {learngene.arch.hidden_size} at batch {batch} / sum of solo steps"
    return BenchmarkRow(what, ratio, "x", 1.0, "lower")


def _curve(root: Path, learngene: Artifact, device: torch.device, quick: bool) -> list[BenchmarkRow]:
    """Steps of packs by number of jobs and batch.

    Small batches gain from larger products and fewer calls, large ones from what the jobs of a seed share.
    """
    import torch

    torch.set_num_threads(1)  # as in a worker of the local pool
    sizes = {4: (2,), 64: (2,)} if quick else {4: (2, 4, 12), 16: (2, 4, 12), 64: (2, 4, 12), 256: (4,)}
    rows = []
    for batch, numbers in sizes.items():
        # Few steps in each of many rounds: on a shared machine, single ratios differ by a tenth and more.
        count, rounds = max(1, min(4, 128 // batch)), 1 if quick else 9
        for jobs in numbers:
            say(f"steps of {jobs} jobs at batch {batch}")
            depths = [DEPTHS[i % 4] for i in range(jobs)]
            rows.append(_step_row(root, learngene, depths, batch, device, count, rounds))
    return rows


def _large(root: Path, device: torch.device) -> list[BenchmarkRow]:
    """Steps of packs of width 256 and 12 layers, where the products of a single job are large already."""
    learngene = _random_learngene(root / "large", DEMO.model_copy(update={"hidden_size": 256, "num_layers": 12}))
    rows = []
    for batch in (4, 16):
        say(f"steps of 4 jobs of width 256 and 12 layers at batch {batch}")
        rows.append(_step_row(root, learngene, [12] * 4, batch, device, 1, 7))
    return rows


def _gpu(root: Path, learngene: Artifact, device: torch.device) -> list[BenchmarkRow]:
    """Throughput of packs over that of single jobs on a GPU, by number of jobs and batch."""
    rows = []
    for jobs in (2, 4, 12, 24, 48):
        depths = [DEPTHS[i % 4] for i in range(jobs)]
        for batch in (16, 64, 256):
            say(f"steps of {jobs} jobs at batch {batch} on the GPU")
            speedup = 1 / _ratio(root, learngene, depths, batch, device, 10, 3)
            bar = 3.0 if jobs == 12 and batch == 16 else None
            what = f"GPU: jobs an hour, {jobs} at batch {batch} packed / in turn"
            rows.append(BenchmarkRow(what, speedup, "x", bar))
    return rows


# --- storage --------------------------------------------------------------------------------------------------------


def _artifact(root: Path) -> list[BenchmarkRow]:
    """Size of the artifact of a DiT-B target of 12 layers, which has its sigma and its biases."""
    import torch

    from fine_dist.artifacts.targets import save_target
    from fine_dist.model.arch import MATRICES

    arch = named("DiT-B/2")
    tensors = {}
    for i in range(12):
        for matrix in MATRICES:
            tensors[f"blocks.{i}.{matrix}.sigma"] = torch.randn(arch.hidden_size)
            tensors[f"blocks.{i}.{matrix}.bias"] = torch.randn(arch.matrix(matrix)[0])
    save_target(
        root / "target", method=CONDENSES.model_dump(), parent=None, arch=arch, tensors=tensors, names=list(tensors),
        facts={},
    )  # fmt: skip
    size = sum(file.stat().st_size for file in (root / "target").iterdir())
    return [BenchmarkRow("artifact of a DiT-B target of 12 layers", size / 2**20, "MiB", 1.0, "lower")]
