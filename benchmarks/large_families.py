"""Bookkeeping for a family of 10,000 targets: planning, listing and status, also on a file system with slow syncs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

from benchmarks.rows import BenchmarkRow, say
from fine_dist.core.config import dump_yaml
from fine_dist.data.settings import DataConfig
from fine_dist.family.config import InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.family.members import expand
from fine_dist.launchers.spec import Capacity, Task
from fine_dist.launchers.state_table import StateTable
from fine_dist.methods import CONDENSES
from fine_dist.model.arch import Arch

SECONDS, MIB = 10.0, 1024.0
"""Bars of a command that looks at all targets."""
SYNC_S = 0.005
"""What a sync takes on the slow file system that is simulated."""
BOOKS_S = 180.0
"""Bar of keeping the state table there, from nothing to all targets done."""
ARCH = Arch(
    hidden_size=32, num_layers=5, num_heads=2, patch_size=2, in_channels=1, input_size=8, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
DEPTHS = (1, 2, 3, 4, 5)


def state_tables(targets: int, bars: bool) -> list[BenchmarkRow]:
    """Commands over a family of so many targets, and its state table on a slow file system."""
    with tempfile.TemporaryDirectory(prefix="fine_dist-many-") as folder:
        root = Path(folder)
        config = family(root, targets)
        file = root / "family.yaml"
        file.write_text(dump_yaml(config))
        rows = _commands(
            {
                "init --dry-run": ["init", "--config", str(file), "--dry-run"],
                "plan": ["plan", "--stage", "init", "--config", str(file)],
            },
            targets,
            bars,
        )
        say(f"the state tables of {targets:,} targets at {SYNC_S * 1e3:g} ms a sync")
        seconds, syncs, packs = keep_books(config)
        about = f"the state tables of {targets:,} targets in {packs} packs, a sync of {SYNC_S * 1e3:g} ms"
        rows += [
            BenchmarkRow(about, seconds, "s", BOOKS_S if bars else None, "lower"),
            BenchmarkRow("  syncs a target", syncs / targets, "", 1.1 if bars else None, "lower"),
        ]
        say(f"{targets:,} targets that are done")
        finish(root, config)
        look = {"init --list": ["init", "--list", config.run_dir], "status": ["status", config.run_dir]}
        return rows + _commands(look, targets, bars)


def family(root: Path, targets: int) -> InitConfig:
    """A family of so many targets (five depths) of a small learngene, with data to train them on."""
    import torch

    from fine_dist.data.encoding import run as encode
    from fine_dist.data.settings import EncodeConfig
    from fine_dist.model.artifact import save_artifact
    from fine_dist.model.factors import FactoredDiT

    encode(EncodeConfig(out=str(root / "data")))
    model = FactoredDiT(ARCH, ARCH.hidden_size, torch.Generator().manual_seed(0))
    save_artifact(
        root / "learngene", kind="learngene", method=CONDENSES.model_dump(), arch=ARCH, tensors=model.state_dict()
    )
    return InitConfig(
        run_dir=str(root / "family"), parent=str(root / "learngene"), data=DataConfig(shards=str(root / "data/train")),
        depths=DEPTHS, seeds=tuple(range(targets // len(DEPTHS))), steps=1, yes=True,
    )  # fmt: skip


def _commands(commands: Mapping[str, Sequence[str]], targets: int, bars: bool) -> list[BenchmarkRow]:
    rows = []
    for name, words in commands.items():
        say(f"{name} of {targets:,} targets")
        seconds, mib = cost_of([sys.executable, "-m", f"fine_dist.{words[0]}", *words[1:]])
        rows += [
            BenchmarkRow(f"{name} of {targets:,} targets", seconds, "s", SECONDS if bars else None, "lower"),
            BenchmarkRow("  peak memory", mib, "MiB", MIB if bars else None, "lower"),
        ]
    return rows


def cost_of(command: Sequence[str]) -> tuple[float, float]:
    """(wall seconds, MiB that were resident at most) of a program. `RuntimeError` with its last words when it fails."""
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.perf_counter() - begun, os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {said.read().decode(errors='replace')[-500:]}")
    return seconds, usage.ru_maxrss / 1024


# --- the state table -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def slow_disk(sync_s: float) -> Iterator[list[int]]:
    """Every sync of this process, of a file or of a file system, takes so long and does nothing else; what is given
    counts them. So the figure is that file system's, whatever the disk beneath does."""
    from fine_dist.core import files
    from fine_dist.launchers import prepare

    count = [0]

    def sync(where: object) -> None:
        count[0] += 1
        time.sleep(sync_s)

    # A real network file system cannot be had in a benchmark; its time is in the number of syncs, which is counted.
    with mock.patch("os.fsync", sync), contextlib.ExitStack() as stack:
        for module in (files, prepare):
            stack.enter_context(mock.patch.object(module, "sync_disk", sync))
        yield count


def keep_books(config: InitConfig, sync_s: float = SYNC_S) -> tuple[float, int, int]:
    """(seconds, syncs, packs) of all that a fan-out writes down but for what its targets themselves save.

    Job files and pending rows; then for every pack its claim and its rows as they start, and each target's end; then
    what is read to say what became of them. All of it in one process, where workers would share it.
    """
    from fine_dist.launchers.prepare import make_specs

    packs = Family(config).packs(Capacity(64, None, True, None))
    made = [Task(pack.name, config.model_copy(update={"only": pack.jobs}), pack.jobs) for pack in packs]
    with slow_disk(sync_s) as syncs:
        begun = time.perf_counter()
        specs = make_specs("fine_dist.init", config, made)
        for spec in specs:
            table = StateTable(config.run_dir)  # a worker's own
            claim = table.claim(spec.rows)
            assert claim is not None  # nobody else is here
            with claim:
                table.start_all(spec.rows)
                for name in spec.rows:
                    table.finish(name, "done")
        rows = StateTable(config.run_dir).rows()
        seconds = time.perf_counter() - begun
    assert all(row.state == "done" for row in rows)
    return seconds, syncs[0], len(specs)


def finish(root: Path, config: InitConfig) -> None:
    """Every target's folder as a finished one has it: the first is trained, the others copy what is looked at."""
    members = expand(config)
    alone = root / "alone.yaml"
    first = members[0]
    alone.write_text(dump_yaml(config.model_copy(update={"run_dir": str(root / "alone"), "only": (first.name,)})))
    cost_of([sys.executable, "-m", "fine_dist.init", "--config", str(alone), "--launcher", "here"])
    trained = root / "alone" / first.name
    for member in members:
        (member.folder / "target").mkdir(parents=True)
        for file in ("metrics.jsonl", "DONE.json", "target/manifest.json"):
            shutil.copyfile(trained / file, member.folder / file)
