"""Trouble on disk: a kill during a checkpoint, a full disk, a directory that is in use."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fine_dist.core.errors import RunDirError
from fine_dist.core.files import sha256_of
from fine_dist.engine import checkpoint
from fine_dist.engine.checkpoint_files import CheckpointReader, write_tensors
from fine_dist.engine.run_dir import RunDir
from tests.engine.test_resume import start_child, wait_for_step
from tests.engine.toy import ToyConfig, engine, toy_fit, toy_outcome


def test_a_kill_during_the_writing_of_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    config = ToyConfig(steps=10**6, engine=engine(checkpoint_every=1))
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        child = start_child(folder, config)
        wait_for_step(folder, 3)
        while not any((folder / "checkpoints").glob(".writing-step_*/*")):
            pass
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        if list((folder / "checkpoints").glob(".writing-step_*")):
            break
    else:
        pytest.fail("no kill hit the writing of a checkpoint")
    newest = (folder / "checkpoints" / "LATEST").read_text()
    CheckpointReader(folder / "checkpoints" / newest).verify()
    steps = int(newest[5:]) + 2
    resumed = toy_outcome(folder, ToyConfig(steps=steps, engine=config.engine))
    whole = toy_outcome(tmp_path / "whole", ToyConfig(steps=steps, engine=config.engine))
    assert resumed.losses == whole.losses
    assert not list((folder / "checkpoints").glob(".writing-*"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own with 3 MiB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_stops_the_run_with_the_reason_and_the_checkpoint_before_stays_usable(small_disk: Path) -> None:
    config = ToyConfig(steps=2)
    toy_fit(small_disk / "run", config)
    saved = small_disk / "run" / "checkpoints" / "step_00000002"
    (small_disk / "ballast").write_bytes(
        b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 65536)
    )
    with pytest.raises(OSError) as caught:
        toy_outcome(small_disk / "run", ToyConfig(steps=6))
    assert caught.value.errno == errno.ENOSPC
    CheckpointReader(saved).verify()
    assert not list((small_disk / "run" / "checkpoints").glob(".writing-*"))
    (small_disk / "ballast").unlink()
    assert len(toy_outcome(small_disk / "run", ToyConfig(steps=6)).losses) == 6


LIMITED = """
import resource, signal, sys
from fine_dist.core.errors import guard
from tests.engine.toy import ToyConfig, toy_fit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(guard(lambda: toy_fit(sys.argv[1], ToyConfig(steps=4)) and None))
"""


def test_a_file_that_cannot_grow_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "File too large" in errors[0] and "Traceback" not in done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000  # the limit was the child's alone


def test_a_directory_in_use_is_refused_naming_the_owner_and_free_again_when_it_is_killed(tmp_path: Path) -> None:
    config = ToyConfig(steps=10**6)
    child = start_child(tmp_path, config)
    try:
        wait_for_step(tmp_path, 2)
        with pytest.raises(RunDirError, match=rf"in use by another live process \(pid {child.pid} on"):
            RunDir(tmp_path).open("toy", {})
    finally:
        child.kill()
        child.wait()
    mine = json.loads((tmp_path / "identity.json").read_text())["identity"]
    with RunDir(tmp_path).open("toy", mine), pytest.raises(RunDirError, match="this very process"):
        RunDir(tmp_path).open("toy", {})


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []
    original = checkpoint.write_tensors

    def slow(path, tensors):
        begun.append(time.perf_counter())
        time.sleep(1.0)
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    config = ToyConfig(steps=11, engine=engine(checkpoint_every=8))
    found = toy_outcome(tmp_path / "slow", config)
    assert time.perf_counter() - begun[0] > 1.9  # two saves, each waited for in the end, the first beside steps 9 to 11
    monkeypatch.undo()
    assert found.losses == toy_outcome(tmp_path / "fast", config).losses


def test_our_tensor_files_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight:a.b@0": torch.randn(3_000_000, generator=generator),  # more than a block
        "scalar": torch.tensor(2.5),
        "bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "count": torch.arange(7),
        "empty": torch.empty(0),
    }
    about = write_tensors(tmp_path / "file.safetensors", tensors)
    assert about == {
        "bytes": (tmp_path / "file.safetensors").stat().st_size,
        "sha256": sha256_of(tmp_path / "file.safetensors"),
    }
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
