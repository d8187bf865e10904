"""Starting the same command again continues a run, exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fine_dist.core.errors import CheckpointError, RunDirError
from fine_dist.engine import dist
from fine_dist.engine.settings import OptimConfig
from fine_dist.model.arch import Arch
from tests.engine.toy import ARCH, Outcome, ToyConfig, engine, toy_fit, toy_model, toy_outcome, toy_program

CHILD = """
import sys
from tests.engine.toy import ToyConfig, toy_fit
toy_fit(sys.argv[1], ToyConfig.model_validate_json(sys.argv[2]))
"""


def start_child(folder: Path, config: ToyConfig) -> subprocess.Popen[bytes]:
    """The same run in a process of its own, to be killed."""
    command = [sys.executable, "-c", CHILD, str(folder), config.model_dump_json()]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})


def wait_for_step(folder: Path, step: int, timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < until, f"no step {step} in {folder} after {timeout_s} s"
        time.sleep(0.005)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours.losses == theirs.losses
    for name, weight in theirs.weights.items():
        assert torch.equal(ours.weights[name], weight), name
    for name, value in theirs.ema.items():
        assert torch.equal(ours.ema[name], value), name


@pytest.mark.parametrize("kind", ["dense", "joint", "sigma"])
def test_a_run_killed_with_kill_9_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    config = ToyConfig(kind=kind, steps=120, optim=OptimConfig(lr=1e-3, schedule="cosine"), engine=engine(log_every=3))
    child = start_child(tmp_path / "killed", config)
    wait_for_step(tmp_path / "killed", 42)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the child had: the order of sums within a product depends on it
    try:
        resumed = toy_outcome(tmp_path / "killed", config)
        whole = toy_outcome(tmp_path / "whole", config)
    finally:
        torch.set_num_threads(threads)
    assert_same(resumed, whole)


def test_metrics_and_tensorboard_of_a_resumed_run_have_every_step_once(tmp_path: Path, caplog) -> None:
    config = ToyConfig(steps=9, engine=engine(checkpoint_every=4, keep_checkpoints=3))
    toy_fit(tmp_path, config)
    # Cut the run back to step 4, as a crash between steps 8 and 9 of a run that saved at 4 would.
    for later in ("step_00000008", "step_00000009"):
        for file in (tmp_path / "checkpoints" / later).iterdir():
            file.write_bytes(b"")
    toy_fit(tmp_path, config)
    assert "step_00000009 is damaged" in caplog.text
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))


def test_a_finished_run_started_again_trains_nothing_and_gives_the_same_model(tmp_path: Path) -> None:
    first = toy_outcome(tmp_path, ToyConfig(steps=3))
    assert_same(toy_outcome(tmp_path, ToyConfig(steps=3)), first)


def test_only_the_last_k_checkpoints_are_kept(tmp_path: Path) -> None:
    toy_fit(tmp_path, ToyConfig(steps=9, engine=engine(keep_checkpoints=3)))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["LATEST", "step_00000006", "step_00000008", "step_00000009"]
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step_00000009"


@pytest.mark.parametrize(
    "damage", ["truncated", "one byte changed", "manifest cut", "step changed", "shapes gone", "extra changed"]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_is_named(
    tmp_path: Path, damage: str, caplog
) -> None:
    config = ToyConfig(steps=7)
    whole = toy_outcome(tmp_path, config)
    newest = tmp_path / "checkpoints" / "step_00000007"
    tensors, manifest = newest / "rank0.safetensors", newest / "manifest.json"
    if damage == "truncated":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif damage == "one byte changed":
        content = bytearray(tensors.read_bytes())
        content[-100] ^= 1
        tensors.write_bytes(bytes(content))
    elif damage != "manifest cut":
        values = json.loads(manifest.read_text())
        if damage == "shapes gone":
            del values["shapes"]
        else:
            values |= {"step": 6} if damage == "step changed" else {"extra": {**values["extra"], "monitor": [1]}}
        manifest.write_text(json.dumps(values))
    else:
        os.truncate(manifest, manifest.stat().st_size // 2)
    assert_same(toy_outcome(tmp_path, config), whole)
    assert "step_00000007 is damaged" in caplog.text


def test_when_every_checkpoint_is_damaged_the_run_stops_and_says_so(tmp_path: Path, caplog) -> None:
    toy_fit(tmp_path, ToyConfig(steps=4))
    for tensors in (tmp_path / "checkpoints").glob("*/rank0.safetensors"):
        tensors.unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        toy_fit(tmp_path, ToyConfig(steps=4))
    assert caplog.text.count("is damaged") == 2
    with pytest.raises(CheckpointError, match="remove this folder to start over"):  # nor does it at the second start
        toy_fit(tmp_path, ToyConfig(steps=4))
    shutil.rmtree(tmp_path / "checkpoints")
    toy_fit(tmp_path, ToyConfig(steps=4))
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step_00000004"


def test_another_config_is_refused_by_its_differing_keys_but_engine_settings_may_change(tmp_path: Path) -> None:
    toy_fit(tmp_path, ToyConfig(steps=2))
    with pytest.raises(RunDirError, match=r"rank: 16 there, 8 now"):
        toy_fit(tmp_path, ToyConfig(steps=2, rank=8))
    with pytest.raises(RunDirError, match=r"engine.ema_decay: 0.9 there, 0.5 now"):
        toy_fit(tmp_path, ToyConfig(steps=2, engine=engine(ema_decay=0.5)))
    toy_fit(tmp_path, ToyConfig(steps=2, engine=engine(micro_batch=2, log_every=7)))


def forget(run_dir: Path) -> None:
    for name in ("identity.json", "config.yaml"):
        (run_dir / name).unlink(missing_ok=True)


def test_a_checkpoint_of_another_data_set_rank_or_architecture_is_refused_naming_what_differs(tmp_path: Path) -> None:
    toy_fit(tmp_path, ToyConfig(steps=2))
    forget(tmp_path)  # as when two configs resolve alike but what they point to changed
    with pytest.raises(CheckpointError, match=r"data: 'abc' in the checkpoint, 'xyz' now"):
        toy_fit(tmp_path, ToyConfig(steps=2, data_hash="xyz"))
    forget(tmp_path)
    with pytest.raises(CheckpointError, match=r"rank: 16 in the checkpoint, 8 now"):
        toy_fit(tmp_path, ToyConfig(steps=2, rank=8))
    forget(tmp_path)
    wider = Arch(**{**ARCH.model_dump(), "hidden_size": 64})
    program = toy_program(ToyConfig(), dist.single_process("cpu"), model=toy_model(ToyConfig(), wider))
    program.identity["arch"] = wider.model_dump()
    with pytest.raises(CheckpointError, match=r"arch.hidden_size: 32 in the checkpoint, 64 now") as caught:
        toy_fit(tmp_path, ToyConfig(steps=2), program)
    assert "trains.blocks.0.o.weight: [32, 32] in the checkpoint, [64, 64] now" in str(caught.value)
