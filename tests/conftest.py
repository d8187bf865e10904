"""Fixtures that several packages share. Everything random is seeded."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_dist.core.config import Config
from fine_dist.core.regular_files import read_rows
from fine_dist.launchers.worker import config_class, import_module
from fine_dist.testing import inputs, lively, tiny_arch

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["DIGITS", "inputs", "lively", "tiny_arch"]


def in_process(main: Callable[[list[str]], int], argv: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, in this process: a process of its own takes seconds to import torch."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(word) for word in argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def kind_of(command: str) -> type[Config]:
    """The class of a command's settings."""
    return config_class(import_module(f"fine_dist.{command}"))


def logged_rows(run_dir: Path, key: str = "loss") -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl that have a key."""
    return [row for row in read_rows(run_dir / "metrics.jsonl") if key in row]


def logged_losses(run_dir: Path) -> list[float]:
    """Training losses that a run has logged."""
    return [row["loss"] for row in logged_rows(run_dir)]


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """What a library puts into the environment (DeepSpeed: RANK and friends) must not make a later test's commands
    believe that they are a worker."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


DIGITS = {"in_channels": 1, "input_size": 8, "num_classes": 10, "learn_sigma": False}
SharedFolder = Callable[[str, Callable[[Path], None]], Path]
"""`shared_folder(name, make)`: a folder that `make` has filled."""


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """Folders that are made once for all processes of `pytest -n`, by whichever needs them first. Read only."""
    # xdist gives each of its processes a folder of its own inside that of the whole run.
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        folder.mkdir(parents=True, exist_ok=True)
        with open(root / "shared" / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the one that makes it
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def digit_shards(shared_folder: SharedFolder) -> Path:
    """The embedded digits as shards: a folder with `train` and `held_out`. Read only."""
    from fine_dist import encode

    return shared_folder("digits", lambda folder: encode.run(encode.EncodeConfig(source="digits", out=str(folder))))


LONG_FILES = (
    "tests/cluster/test_ray.py",
    "tests/cluster/test_slurm_faults.py",
    "tests/cluster/test_slurm.py",
    "tests/test_demo.py",
    "tests/study/test_study_files.py",
    "tests/distributed/test_zero.py",
    "tests/chaos/test_chaos.py",
    "tests/family/test_init_command.py",
    "tests/distributed/test_launchers.py",
    "tests/distributed/test_faults.py",
    "tests/cluster/test_slurm_site.py",
    "tests/family/test_jobs_of_a_pack.py",
    "tests/commands/test_more_steps.py",
    "tests/commands/test_examples.py",
    "tests/pretended_gpu/test_loop.py",
    "tests/pretended_gpu/test_methods.py",
    "tests/pretended_gpu/test_packs.py",
    "tests/pretended_gpu/test_device.py",
    "tests/study/test_measuring.py",
    "tests/study/test_short_form.py",
    "tests/study/test_tune.py",
    "tests/family/test_equality.py",
    "tests/creative/test_run.py",
    "tests/benchmarks/test_speed.py",
    "tests/benchmarks/test_gpu.py",
    "tests/commands/test_commands.py",
    "tests/commands/test_sample_command.py",
    "tests/commands/test_evaluate.py",
    "tests/commands/test_flow.py",
    "tests/stages/test_ancestor.py",
    "tests/stages/test_repa.py",
    "tests/engine/test_trackers.py",
    "tests/engine/test_no_stalls.py",
    "tests/methods/test_compiled_graphs.py",
    "tests/data/test_sources.py",
    "tests/data/test_stream.py",
    "tests/data/test_tokens.py",
    "tests/engine/test_loop.py",
    "tests/evaluation/test_scores.py",
    "tests/launchers/test_prepare.py",
    "tests/pretended_gpu/test_sampling.py",
    "tests/methods/test_a_new_method.py",
    "tests/methods/test_contract.py",
    "tests/engine/test_resume.py",
    "tests/engine/test_memory.py",
    "tests/engine/test_disk.py",
    "tests/launchers/test_local.py",
    "tests/launchers/test_capacity.py",
    "tests/commands/test_another_user.py",
    "tests/commands/test_going_on.py",
    "tests/data/test_interrupted.py",
    "tests/data/test_faults.py",
    "tests/test_fuzz.py",
    "tests/test_fuzz_readers.py",
    "tests/test_readme.py",
    "tests/test_wheel.py",
)
"""Files that take longest, in the order in which they begin. `pytest -n 3 --dist loadfile` assigns whole files: one of
two minutes that begins last would leave the other processes idle. Their tests have the marker `long`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, and mark their tests. The order within a file stays."""
    root = Path(__file__).resolve().parents[1]
    rank = {root / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    for item in items:
        if item.path in rank:
            item.add_marker("long")
