"""A real command under torchrun and under DeepSpeed's launcher, on the embedded digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fine_dist.condense import main as condense_here
from fine_dist.core.errors import EXIT_RESUME
from fine_dist.core.processes import free_port
from fine_dist.data.shards import write_shards
from fine_dist.data.small_images import digits
from fine_dist.model.artifact import load_artifact
from tests.conftest import logged_losses

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def condense(folder: Path, run: str, *flags: str) -> list[str]:
    """The command line of a small condensation, from `-m` or `--module`'s argument on."""
    data = folder / "data"
    if not data.exists():
        images, labels = digits("train")
        write_shards(data, images[:512], labels[:512], num_classes=10, shard_samples=128)
    fields = {
        "run_dir": folder / run, "data.shards": data, "steps": 12, "batch": 16, "arch.hidden_size": 32,
        "arch.num_layers": 2, "arch.num_heads": 2, "arch.in_channels": 1, "arch.input_size": 8,
        "arch.num_classes": 10, "method.rank": 32, "engine.device": "cpu", "engine.threads": 1, "engine.log_every": 1,
        "engine.checkpoint_every": 100, "engine.preview_every": 100, "sampler.steps": 2,
    }  # fmt: skip
    words = [word for key, value in fields.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["fine_dist.condense", *words, "--arch.no-learn-sigma", *flags]


def run(command: list[str], **env: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_LOG_LEVEL": "error", **env}
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def torchrun(ranks: int, words: list[str]) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", str(free_port()), "-m", *words]


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=150)
    assert process.returncode == code, output
    return output


def test_the_deepspeed_launcher_trains_as_one_process_does(tmp_path: Path) -> None:
    """torchrun's ranks are compared in tests/cluster, with those of SLURM and of Ray."""
    assert condense_here(condense(tmp_path, "single", "--launcher", "here")[1:]) == 0
    zero = ("--engine.backend", "deepspeed", "--engine.deepspeed.stage", "3")
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()), "--module"]
    finish(run([*launcher, *condense(tmp_path, "deepspeed", *zero)]))
    assert logged_losses(tmp_path / "deepspeed") == pytest.approx(logged_losses(tmp_path / "single"), rel=1e-4)
    artifact = load_artifact(tmp_path / "deepspeed" / "learngene", "learngene")
    assert artifact.tensors.keys() == load_artifact(tmp_path / "single" / "learngene").tensors.keys()


def test_a_signal_to_a_job_under_torchrun_is_resumed_by_the_same_command(tmp_path: Path) -> None:
    words = condense(tmp_path, "run", "--steps", "400")
    job = run([sys.executable, "-m", "fine_dist.launchers.torchrun", *torchrun(2, words)[1:]])
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.05)
    start = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"][-1]
    assert start["world_size"] == 2
    os.kill(start["pid"], signal.SIGUSR1)
    output, _ = job.communicate(timeout=90)
    assert job.returncode == EXIT_RESUME, output
    saved = int((tmp_path / "run" / "checkpoints" / "LATEST").read_text()[5:])
    assert saved < 400
    assert condense_here([*words[1:], "--launcher", "here"]) == 0  # and in one process this time
    assert len(logged_losses(tmp_path / "run")) == 400
