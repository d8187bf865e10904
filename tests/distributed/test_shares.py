"""With the plain backend each rank owns a share of averages and checkpoints, and each node reads storage once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_dist.core.errors import CheckpointError
from fine_dist.engine import dist
from fine_dist.engine.checkpoint import Checkpoints
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.ema import Ema
from fine_dist.engine.optimizer import MOMENTS
from fine_dist.engine.plain_backend import PlainBackend
from fine_dist.engine.settings import OptimConfig
from fine_dist.engine.world import World
from fine_dist.testing import run_distributed
from tests.engine.toy import Outcome, ToyConfig, toy_fit, toy_model, toy_outcome

pytestmark = pytest.mark.distributed


def averaged() -> tuple[int, int, bool]:
    """Numbers that this rank averages, all numbers, and whether the gathered average is that of one process."""
    world = dist.world("cpu")
    found = []
    for here in (world, World()):
        model = toy_model(ToyConfig())
        backend = PlainBackend(model, OptimConfig(), here)
        ema = Ema(backend, 0.9)
        generator = torch.Generator().manual_seed(1)
        for update in range(1, 4):
            for p in model.parameters():
                p.data.add_(torch.randn(p.shape, generator=generator))
            ema.update(update)
        found.append((sum(value.numel() for value in ema.values.values()), ema.gather()))
    (mine, ours), (total, theirs) = found
    same = {name: torch.equal(ours[name], value) for name, value in theirs.items()} if world.is_main else {}
    return mine, total, all(same.values()) and (bool(same) or not ours)


def test_two_ranks_hold_half_of_the_average_each_and_gather_that_of_one_process() -> None:
    (first, total, same), (second, _, also) = run_distributed(averaged, 2)
    assert same and also
    assert first + second == total and abs(first - second) <= 1


def test_a_checkpoint_that_two_ranks_wrote_by_range_goes_on_in_one_process(tmp_path: Path) -> None:
    config = ToyConfig(steps=4)
    two: Outcome = run_distributed(toy_outcome, 2, str(tmp_path / "run"), config)[0]
    files = {
        file.name: file.stat().st_size for file in (tmp_path / "run/checkpoints/step_00000004").glob("*.safetensors")
    }
    assert files.keys() == {"rank0.safetensors", "rank1.safetensors"}
    assert max(files.values()) < 1.2 * min(files.values())
    whole = toy_outcome(tmp_path / "whole", config.model_copy(update={"steps": 6}))
    longer = toy_outcome(tmp_path / "run", config.model_copy(update={"steps": 6}))
    assert longer.losses[:4] == two.losses and longer.losses == pytest.approx(whole.losses, rel=1e-4)
    for name, value in whole.ema.items():
        torch.testing.assert_close(longer.ema[name], value, rtol=1e-3, atol=1e-5, msg=name)


def of_two_nodes() -> World:
    """This rank of four among two pretended nodes of two."""
    os.environ |= {"LOCAL_RANK": str(int(os.environ["RANK"]) % 2), "LOCAL_WORLD_SIZE": "2"}
    return dist.world("cpu")


def resumed(folder: str) -> tuple[int, int, list[float]]:
    """Files that this rank hashed, tensors that it read whole, and sums of the weights and moments that it has then."""
    of_two_nodes()
    toy_fit(folder, ToyConfig(steps=2))
    counts = {"verify": 0, "read_full": 0}
    for name in counts:
        body = getattr(CheckpointReader, name)

        def counting(self, *args, name=name, body=body):
            counts[name] += 1
            return body(self, *args)

        setattr(CheckpointReader, name, counting)
    states = []
    load = PlainBackend.load

    def loading(self, checkpoint):
        load(self, checkpoint)
        kept = [self.optimizer.state[p][key] for p in self.parameters for key in MOMENTS]
        states.extend(float(x.detach().double().sum()) for x in (*self.parameters, *kept))

    PlainBackend.load = loading  # type: ignore[method-assign]
    toy_fit(folder, ToyConfig(steps=3))
    return counts["verify"], counts["read_full"], states


def test_the_first_rank_of_each_node_reads_and_hashes_and_its_node_gets_the_same(tmp_path: Path) -> None:
    found = run_distributed(resumed, 4, str(tmp_path / "run"), timeout_s=240)
    assert [verified for verified, _, _ in found] == [1, 0, 1, 0]
    assert [read > 0 for _, read, _ in found] == [True, False, True, False]
    assert found[0][2] == found[1][2] == found[2][2] == found[3][2] and any(found[0][2])


def seen_by(folders: list[str], identity: dict[str, Any]) -> str:
    """What a rank says of a checkpoint that its node sees in the folder of that node."""
    world = of_two_nodes()
    try:
        Checkpoints(Path(folders[world.rank // 2]), world, identity, keep=2).newest()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_node_that_sees_another_file_is_named_on_every_rank(tmp_path: Path) -> None:
    toy_fit(tmp_path / "run", ToyConfig(steps=2), here=dist.single_process("cpu"))
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "stale")
    [file] = (tmp_path / "stale/step_00000002").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    identity = CheckpointReader(tmp_path / "run/checkpoints/step_00000002").identity
    folders = [str(tmp_path / "run/checkpoints"), str(tmp_path / "stale")]
    for said in run_distributed(seen_by, 4, folders, identity, timeout_s=240):
        assert "(rank 2) reads something else" in said and "rank0.safetensors is not what was written" in said
