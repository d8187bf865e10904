"""What trains on a CPU trains on a GPU: the same losses, in bf16, compiled, resumed, under ZeRO and in packs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.world import World
from fine_dist.testing import run_distributed
from tests.conftest import lively
from tests.engine.toy import ARCH, Outcome, ToyConfig, ToyStream, engine, toy_fit, toy_model
from tests.family.tools import packed, solo

pytestmark = pytest.mark.gpu

SUMS = 2e-3
"""Relative, on losses: a GPU adds in another order, and ten steps of AdamW enlarge what comes of it."""
# eps = 1e-4: a gradient that is zero in real arithmetic (the key's bias) moves its weight by rounding alone otherwise.
OPTIM = OptimConfig(lr=1e-3, eps=1e-4)


def outcome(folder: Path, here: World, config: ToyConfig) -> Outcome:
    """A toy run on a device: its losses, its weights and their average, in host memory."""
    fitted = toy_fit(folder, config, here=here)
    assert next(iter(fitted.model.parameters())).device.type in (here.device.type, "cpu")  # ZeRO-3's copy: the host
    weights = {name: p.detach().cpu().clone() for name, p in fitted.model.named_parameters()}
    return Outcome([row["loss"] for row in fitted.rows if "loss" in row], weights, fitted.ema)


@pytest.mark.parametrize("kind", ["dense", "joint", "sigma"])
def test_gradients_in_full_fp32_are_the_cpus(here: World, kind: str) -> None:
    found = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for device in (torch.device("cpu"), here.device):
            trained = {name for name, p in toy_model(ToyConfig(kind=kind)).named_parameters() if p.requires_grad}
            model = lively(toy_model(ToyConfig(kind=kind))).to(device)
            batch = next(ToyStream(8, World()).batches()).to(device)
            Objective(DiffusionConfig(), ARCH, seed=0)(model, batch).mean().backward()
            grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
            assert grads.keys() == trained
            found.append(grads)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, grad in found[0].items():
        # fp32 sums in another order, over at most 8 x 16 rows
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("kind", ["dense", "joint", "sigma"])
def test_losses_are_the_cpus(tmp_path: Path, here: World, kind: str) -> None:
    config = ToyConfig(kind=kind, steps=10, optim=OPTIM)
    ours = outcome(tmp_path / "here", here, config)
    cpu = outcome(tmp_path / "cpu", dist.single_process("cpu"), config)
    assert len(cpu.losses) == 10 and cpu.losses[0] != cpu.losses[-1]
    assert ours.losses == pytest.approx(cpu.losses, rel=SUMS)


@pytest.mark.parametrize("kind", ["dense", "joint", "sigma"])
def test_bf16_follows_fp32_and_keeps_weights_and_average_in_fp32(tmp_path: Path, here: World, kind: str) -> None:
    half = outcome(tmp_path / "bf16", here, ToyConfig(kind=kind, steps=10, engine=engine(precision="bf16")))
    full = outcome(tmp_path / "fp32", here, ToyConfig(kind=kind, steps=10))
    assert half.losses == pytest.approx(full.losses, rel=0.02)  # bf16 has 8 bits: 0.4% a rounding
    assert half.losses != full.losses
    assert {t.dtype for t in (*half.weights.values(), *half.ema.values())} == {torch.float32}


@pytest.mark.parametrize("kind", ["dense", "joint"])
def test_compiled_blocks_compute_what_eager_ones_do(tmp_path: Path, here: World, kind: str, caplog) -> None:
    compiled = outcome(tmp_path / "compiled", here, ToyConfig(kind=kind, steps=4, engine=engine(compile=True)))
    assert "torch.compile failed" not in caplog.text
    assert compiled.losses == pytest.approx(
        outcome(tmp_path / "eager", here, ToyConfig(kind=kind, steps=4)).losses, rel=SUMS
    )


@pytest.mark.parametrize("kind", ["dense", "sigma"])
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path: Path, here: World, kind: str) -> None:
    whole = outcome(tmp_path / "whole", here, ToyConfig(kind=kind, steps=6, optim=OPTIM))
    outcome(tmp_path / "twice", here, ToyConfig(kind=kind, steps=4, optim=OPTIM))
    twice = outcome(tmp_path / "twice", here, ToyConfig(kind=kind, steps=6, optim=OPTIM))
    assert len(twice.losses) == 6
    for name, weight in whole.weights.items():
        # attention's backward pass may add in any order on a GPU; a CPU gives the same bits
        torch.testing.assert_close(twice.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["dense", "joint"])
def test_a_deterministic_run_that_is_resumed_is_bit_identical(tmp_path: Path, here: World, kind: str) -> None:
    settings = engine(deterministic=True, precision="bf16")
    configs = [ToyConfig(kind=kind, steps=steps, engine=settings) for steps in (4, 6)]
    try:
        whole = outcome(tmp_path / "whole", here, configs[1])
        outcome(tmp_path / "twice", here, configs[0])
        twice = outcome(tmp_path / "twice", here, configs[1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert twice.losses == whole.losses
    assert all(torch.equal(twice.weights[name], weight) for name, weight in whole.weights.items())


def test_a_checkpoint_of_one_device_is_read_on_the_other(tmp_path: Path, here: World) -> None:
    whole = outcome(tmp_path / "whole", dist.single_process("cpu"), ToyConfig(steps=6, optim=OPTIM))
    outcome(tmp_path / "moved", here, ToyConfig(steps=4, optim=OPTIM))
    moved = outcome(tmp_path / "moved", dist.single_process("cpu"), ToyConfig(steps=6, optim=OPTIM))
    assert moved.losses == pytest.approx(whole.losses, rel=SUMS)


def zero_outcome(folder: str, device: str, config: str) -> Outcome:
    """A toy run in the process of a rank, which DeepSpeed's process group ends with."""
    return outcome(Path(folder), dist.world(device), ToyConfig.model_validate_json(config))


@pytest.mark.parametrize("stage", [1, 2, 3, None])
def test_sharding_in_a_world_of_one_computes_what_the_plain_backend_does(
    tmp_path: Path, here: World, stage: int | None
) -> None:
    """ZeRO's stages, and FSDP2 (None)."""
    config = ToyConfig(kind="joint", steps=5, optim=OPTIM)
    choice = {"backend": "deepspeed", "deepspeed": {"stage": stage}} if stage else {"backend": "fsdp2"}
    sharded = config.model_copy(update={"engine": engine(**choice)})
    words = (str(tmp_path / "sharded"), here.device.type, sharded.model_dump_json())
    [ours] = run_distributed(zero_outcome, 1, *words, env={"DS_ACCELERATOR": here.device.type})
    plain = outcome(tmp_path / "plain", here, config)
    assert ours.losses == pytest.approx(plain.losses, rel=SUMS)
    assert ours.weights.keys() == plain.weights.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_jobs_of_a_pack_train_as_each_would_alone(learngene, shards, here: World, precision: str) -> None:
    points = [(2, 0, 1e-3), (4, 1, 3e-3), (3, 2, 1e-3)]
    settings = EngineConfig(device=here.device.type, precision=precision, log_every=1)
    run, seen = packed(learngene, points, shards / "train", steps=6, world=here, engine=settings)
    run.train()
    for index, point in enumerate(points):
        alone, _ = solo(learngene, point, shards / "train", 6)  # on the CPU, in fp32
        assert seen.losses[index] == pytest.approx(alone, rel=SUMS if precision == "fp32" else 0.02)
