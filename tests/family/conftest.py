"""A learngene that has learned something, and real shards, made once for all tests of the fan-out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.encode import EncodeConfig
from fine_dist.encode import run as encode
from fine_dist.model.artifact import Artifact, load_artifact, save_artifact
from fine_dist.model.factors import FactoredDiT
from tests.conftest import tiny_arch
from tests.family.tools import init_argv, run_here


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """The embedded digits as shards: `train` and `held_out`."""
    folder = tmp_path_factory.mktemp("digits")
    encode(EncodeConfig(out=str(folder), shard_samples=128))
    return folder


@pytest.fixture(scope="session")
def learngene(shards, tmp_path_factory) -> Artifact:
    """A 4-layer learngene of width 32 after 150 steps of joint training."""
    arch = tiny_arch()
    model = FactoredDiT(arch, 32, torch.Generator().manual_seed(0))
    objective = Objective(DiffusionConfig(), arch, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    stream = LatentStream(DataConfig(shards=str(shards / "train")), seed=0, global_batch=32)
    for batch, _ in zip(stream.batches(), range(150)):
        loss = objective(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stream.close()
    folder = tmp_path_factory.mktemp("condensed") / "learngene"
    save_artifact(folder, kind="learngene", method={"name": "fine"}, arch=arch, tensors=model.state_dict())
    return load_artifact(folder)


@pytest.fixture(scope="session")
def family(learngene, shards, tmp_path_factory) -> Path:
    """The run directory of four targets, trained by the local pool; tests change copies of it only."""
    run_dir = tmp_path_factory.mktemp("run") / "family"
    done = run_here(init_argv(learngene, shards, run_dir, "--seeds", "0", "1", "--launcher", "local"))
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir
