"""Overhead of a family of 10,000 targets: planning, listing, status, and the state table with slow syncs."""

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
"""Targets of a command that reads all members of the family: wall seconds, and peak memory in MiB."""
SYNC_S = 0.005
"""Seconds of a sync on the simulated file system."""
BOOKS_S = 180.0
"""Target of all writes to the state table there, in seconds."""
ARCH = Arch(
    hidden_size=32, num_layers=5, num_heads=2, patch_size=2, in_channels=1, input_size=8, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
DEPTHS = (1, 2, 3, 4, 5)


def state_tables(targets: int, bars: bool) -> list[BenchmarkRow]:
    """Rows about commands for a family, and about its state table with slow syncs.

    Args:
        targets: Number of targets of the family.
        bars: Whether the rows have targets.
    """
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
        commands = {"init --list": ["init", "--list", config.run_dir], "status": ["status", config.run_dir]}
        return rows + _commands(commands, targets, bars)


def family(root: Path, targets: int) -> InitConfig:
    """The config of a family of a small learngene; writes the learngene and the data.

    Args:
        root: Folder for all files.
        targets: Number of targets, a multiple of the five depths.
    """
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
    """Run a program; returns its wall seconds and the peak of its resident memory in MiB.

    Raises:
        RuntimeError: The program failed; the message has the end of its output.
    """
    with tempfile.TemporaryFile() as output:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        # wait4 reports the memory of this one process. As `Popen` then does not see its end, the code is set here.
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.perf_counter() - begun, os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {output.read().decode(errors='replace')[-500:]}")
    return seconds, usage.ru_maxrss / 1024  # KiB on Linux


# --- the state table -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def slow_disk(sync_s: float) -> Iterator[list[int]]:
    """A context in which every sync of this process sleeps for some seconds instead of syncing.

    Args:
        sync_s: Seconds of a sync.

    Yields:
        A list with one number, which counts the syncs.
    """
    from fine_dist.core import files
    from fine_dist.launchers import prepare

    count = [0]

    def sync(where: object) -> None:
        count[0] += 1
        time.sleep(sync_s)

    # On a network file system, syncs take most of the time of small writes. Replacing them makes the result independent
    # of this machine's disk.
    with mock.patch("os.fsync", sync), contextlib.ExitStack() as stack:
        for module in (files, prepare):
            stack.enter_context(mock.patch.object(module, "sync_disk", sync))
        yield count


def keep_books(config: InitConfig, sync_s: float = SYNC_S) -> tuple[float, int, int]:
    """Write and read everything that a fan-out needs besides the files of its targets, in one process.

    These are the job files and pending rows; for every pack its claim, its rows when it starts, and the row of each
    target when it ends; and finally all rows, for the report.

    Args:
        config: The family.
        sync_s: Seconds of a sync.

    Returns:
        Seconds, number of syncs, and number of packs.
    """
    from fine_dist.launchers.prepare import make_specs

    packs = Family(config).packs(Capacity(64, None, True, None))
    tasks = [Task(pack.name, config.model_copy(update={"only": pack.jobs}), pack.jobs) for pack in packs]
    with slow_disk(sync_s) as syncs:
        begun = time.perf_counter()
        specs = make_specs("fine_dist.init", config, tasks)
        for spec in specs:
            table = StateTable(config.run_dir)  # a new one, as in each worker
            claim = table.claim(spec.rows)
            assert claim is not None  # no other process uses the table
            with claim:
                table.start_all(spec.rows)
                for name in spec.rows:
                    table.finish(name, "done")
        rows = StateTable(config.run_dir).rows()
        seconds = time.perf_counter() - begun
    assert all(row.state == "done" for row in rows)
    return seconds, syncs[0], len(specs)


def finish(root: Path, config: InitConfig) -> None:
    """Train the first target, and copy the files that the commands read into the folders of all targets."""
    members = expand(config)
    first = members[0]
    file = root / "first.yaml"
    file.write_text(dump_yaml(config.model_copy(update={"run_dir": str(root / "first"), "only": (first.name,)})))
    cost_of([sys.executable, "-m", "fine_dist.init", "--config", str(file), "--launcher", "here"])
    trained = root / "first" / first.name
    for member in members:
        (member.folder / "target").mkdir(parents=True)
        for name in ("metrics.jsonl", "DONE.json", "target/manifest.json"):
            shutil.copyfile(trained / name, member.folder / name)
