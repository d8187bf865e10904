"""Ranks on processors that round differently train one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fine_dist.core.errors import ReportedElsewhere, TrainingError
from fine_dist.core.processes import free_port, rank_environment
from fine_dist.engine import dist, replica_check
from fine_dist.engine.settings import EngineConfig
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from fine_dist.testing import run_distributed
from tests.conftest import lively, tiny_arch

ROOT = Path(__file__).resolve().parents[2]
OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}


@pytest.mark.distributed
def test_a_decomposition_on_mixed_processors_is_made_once(tmp_path, digit_shards):
    arch = tiny_arch(num_layers=3)
    ancestor = lively(DiT(arch), std=0.1)
    save_artifact(tmp_path / "a", kind="model", method={"name": "scratch"}, arch=arch, tensors=ancestor.state_dict())
    words = [
        sys.executable, "-m", "fine_dist.condense", "--config", str(tmp_path / "c.yaml"), "--method.sweeps", "5",
        "--run-dir", str(tmp_path / "run"), "--ancestor", str(tmp_path / "a"), "--method.rank", "24", "--steps", "4",
        "--batch", "8", "--data.shards", str(digit_shards / "train"), "--engine.device", "cpu",
        "--engine.checkpoint-every", "2", "--method.initial", "decompose",
    ]  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps({"arch": arch.model_dump()}))
    port = free_port()
    ranks = []
    for rank in range(2):
        env = {**os.environ, **rank_environment(rank, 2, rank, 2, "127.0.0.1", port), "OMP_NUM_THREADS": "1"}
        env |= {"TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), **(OTHER_PROCESSOR if rank else {})}
        ranks.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    learngene = load_artifact(tmp_path / "run" / "learngene")
    assert all(tensor.isfinite().all() for tensor in learngene.tensors.values())


def apart(change: float, backend: str) -> tuple[str, list[float]]:
    world = dist.world("cpu")
    model = lively(DiT(tiny_arch(num_layers=1)))
    if world.rank == 1:
        model.patch.weight.data[0, 0] += change
    try:
        told = replica_check.check(model, world, EngineConfig(backend=backend), "at step 3")
    except (TrainingError, ReportedElsewhere) as error:
        told = f"{type(error).__name__}: {error}"
    return told, [float(x) for x in model.patch.weight.data.flatten()[:3]]


@pytest.mark.distributed
def test_rounding_is_mended_and_anything_more_is_an_error_that_names_the_rank():
    same = run_distributed(apart, 2, 0.0, "plain")
    assert [told for told, _ in same] == ["", ""]
    drifted = run_distributed(apart, 2, 1e-5, "plain")
    assert all("drifted" in told and "rank 1" in told for told, _ in drifted)
    assert drifted[0][1] == drifted[1][1] == same[0][1]  # rank 1 has rank 0's weights again
    broken = run_distributed(apart, 2, 1.0, "plain")
    assert [told.partition(":")[0] for told, _ in broken] == ["TrainingError", "ReportedElsewhere"]
    assert all("weights of rank 1 are not those of rank 0" in told for told, _ in broken)


def test_a_fingerprint_sees_one_bit_and_two_values_in_each_others_place():
    model = lively(DiT(tiny_arch(num_layers=1)))
    before = replica_check.fingerprint(model)
    flat = model.patch.weight.data.view(-1)
    flat[0], flat[1] = float(flat[1]), float(flat[0])
    assert replica_check.fingerprint(model) != before
    flat[0], flat[1] = float(flat[1]), float(flat[0])
    assert replica_check.fingerprint(model) == before
    flat[5] = torch.nextafter(flat[5], torch.tensor(9.0))
    assert replica_check.fingerprint(model) != before
