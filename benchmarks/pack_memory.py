"""Memory of packs of different sizes, each measured in a new process (Linux).

    python -m benchmarks.pack_memory JOBS WIDTH BATCH     prints what `memory_of` returns

The targets are models of 4 layers on 64 tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peak_memory import kib, release_free_memory
from benchmarks.rows import BenchmarkRow, say
from fine_dist.model.arch import Arch

if TYPE_CHECKING:
    from fine_dist.model.factors import SharedForm

BAR = 1.15
"""Target of every row: at most this much more memory than expected."""


def memory_rows(quick: bool) -> list[BenchmarkRow]:
    """Memory of packs, compared with one model plus the activations of every job.

    Args:
        quick: Whether to use a smaller model and fewer sizes of packs.
    """
    width, batch = (128, 32) if quick else (256, 32)
    # With this threshold, glibc allocates every tensor by its own mmap, so that freed tensors leave the resident set.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    measured: dict[int, list[int]] = {}
    for jobs in (1, 8) if quick else (1, 2, 4, 8):
        say(f"memory of {jobs} jobs")
        command = [sys.executable, "-m", "benchmarks.pack_memory", str(jobs), str(width), str(batch)]
        result = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        measured[jobs] = [int(number) for number in result.stdout.split()]
    model = measured[8][0] / measured[1][0]
    rows = [BenchmarkRow("memory: model of a pack of 8 / of 1 (U and V once)", model, "x", BAR, "lower")]
    for jobs in sorted(set(measured) - {1}):
        what = f"memory: activations of {jobs} jobs / {jobs} x those of one"
        rows.append(BenchmarkRow(what, measured[jobs][1] / (jobs * measured[1][1]), "x", BAR, "lower"))
    planned = measured[8][1] / (8 * measured[8][2])
    return [*rows, BenchmarkRow("memory: activations measured / planned", planned, "x", BAR, "lower")]


def memory_of(jobs: int, width: int, batch: int) -> tuple[int, int, int]:
    """Memory of a pack in bytes, measured in this process, which should have done nothing else.

    Args:
        jobs: Number of targets in the pack.
        width: Width of the targets (D).
        batch: Samples of each target.

    Returns:
        Bytes of the model, bytes of the activations of all targets, and bytes that the planner expects for the
        activations of one target.
    """
    import torch

    from fine_dist.family.pack_model import PackedDiT, PackInputs
    from fine_dist.family.packing import sample_bytes
    from fine_dist.model.factors import FactoredDiT
    from fine_dist.model.roles import train_only

    arch = Arch(
        hidden_size=width, num_layers=4, num_heads=4, patch_size=2, in_channels=1, input_size=16, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip

    def targets() -> Iterator[SharedForm]:
        for _ in range(jobs):
            model = train_only(FactoredDiT(arch, width, torch.Generator().manual_seed(0)), "scaler")
            form = model.shared_form()
            assert form is not None  # only sigma trains
            yield form

    before = _resident()
    pack = PackedDiT(targets())
    built = _resident()
    z = torch.randn(jobs, batch, *arch.latent_shape)
    t, y = torch.zeros(jobs, batch, dtype=torch.int64), torch.zeros(jobs, batch, dtype=torch.int64)
    # The result is held during the measurement, because its graph holds the activations that a backward pass needs.
    out = pack(PackInputs(z, t, y)).square().sum()
    after = _resident()
    del out
    return built - before, after - built, batch * sample_bytes(arch, width)


def _resident() -> int:
    """Bytes of this process's resident set, without freed memory."""
    release_free_memory()
    return kib(Path("/proc/self/status"), "VmRSS") * 1024


def main(jobs: str, width: str, batch: str) -> None:
    """Print the result of `memory_of`."""
    import torch

    torch.set_num_threads(1)
    print(*memory_of(int(jobs), int(width), int(batch)))


if __name__ == "__main__":
    main(*sys.argv[1:])
