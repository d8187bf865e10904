"""ZeRO computes what one process computes: gradients, updates, EMA, at any stage, world size and compute path."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from fine_dist.core.errors import ResumeLater
from fine_dist.engine import dist
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.settings import OptimConfig
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.testing import run_distributed
from tests.engine.test_resume import assert_same
from tests.engine.toy import ARCH, Outcome, ToyConfig, engine, toy_fit, toy_outcome, toy_program

pytestmark = pytest.mark.distributed

# AdamW divides by the square root of a gradient's own size, so with eps = 1e-8 a gradient that is exactly zero in real
# arithmetic (the key's bias: softmax ignores it) moves its weight by rounding noise alone. eps = 1e-4 keeps the noise
# of such weights below the tolerance and changes no other weight's comparison.
OPTIM = OptimConfig(lr=1e-3, eps=1e-4)

CASES = {
    "joint, composed": {"kind": "joint", "path": "composed"},
    "joint, factored": {"kind": "joint", "path": "factored"},
    "sigma, composed": {"kind": "sigma", "path": "composed"},
    "sigma, factored": {"kind": "sigma", "path": "factored"},
}


def zero(folder: Path, stage: int, **fields: object):
    """An engine config with a ZeRO stage at which every parameter, however small, is partitioned."""
    extra = folder / "extra.json"
    extra.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    choice = {"stage": stage, "extra": str(extra) if stage == 3 else None}
    return engine(backend="deepspeed", deepspeed=choice, **fields)


def several(folder: str, configs: dict[str, str]) -> dict[str, Outcome]:
    """Several runs, one after the other, in one world."""
    return {name: toy_outcome(f"{folder}/{name}", ToyConfig.model_validate_json(c)) for name, c in configs.items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the tensor's own size."""
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize(
    ("world_size", "recompute"), [(3, "none"), (2, "blocks"), pytest.param(2, "none", marks=pytest.mark.slow)]
)
def test_shared_factors_under_zero_3_have_the_gradients_and_12_updates_of_a_single_process(
    tmp_path: Path, world_size: int, recompute: str
) -> None:
    plain, sharded = {}, {}
    for name, choice in CASES.items():
        common = {"steps": 12, "global_batch": 12, "optim": OPTIM, **choice}
        plain[name] = ToyConfig(**common, engine=engine(checkpoint_every=12))
        settings = zero(tmp_path, 3, checkpoint_every=12, activation_checkpointing=recompute)
        sharded[name] = ToyConfig(**common, engine=settings).model_dump_json()
    found = run_distributed(several, world_size, str(tmp_path / "sharded"), sharded)[0]
    for name, config in plain.items():
        single = toy_outcome(tmp_path / "single" / name, config)
        assert found[name].losses == pytest.approx(single.losses, rel=1e-5)
        for key, weight in single.weights.items():
            assert distance(found[name].weights[key], weight) < 1e-5, (name, key)
        for key, value in single.ema.items():
            assert distance(found[name].ema[key], value) < 1e-5, (name, key)
            assert not torch.equal(value, single.weights[key])  # an average that lags behind what moves
        # The first moment is the average of the gradients of all 12 steps.
        ours = CheckpointReader(tmp_path / "sharded" / name / "checkpoints" / "step_00000012")
        theirs = CheckpointReader(tmp_path / "single" / name / "checkpoints" / "step_00000012")
        assert ours.shapes == theirs.shapes and ours.optimizer_steps == theirs.optimizer_steps
        scale = max(float(theirs.read_full("exp_avg", key).norm()) for key in theirs.shapes)
        for key in theirs.shapes:
            difference = (ours.read_full("exp_avg", key) - theirs.read_full("exp_avg", key)).norm()
            assert difference < 1e-5 * scale, (name, key)


def test_one_two_and_four_processes_draw_the_same_loss_curve_over_20_steps(tmp_path: Path) -> None:
    config = ToyConfig(kind="joint", steps=20, engine=engine(checkpoint_every=20))
    single = toy_outcome(tmp_path / "1", config)
    runs = {
        "plain, 2 processes": (2, config),
        "plain, 4 processes": (4, config),
        "plain, 2 processes, accumulating": (2, ToyConfig(**{**dict(config), "engine": engine(micro_batch=1)})),
        "ZeRO-2, 4 processes": (4, ToyConfig(**{**dict(config), "engine": zero(tmp_path, 2, micro_batch=1)})),
    }
    for name, (world_size, choice) in runs.items():
        found = run_distributed(toy_outcome, world_size, tmp_path / name, choice)[0]
        assert len(found.losses) == 20
        assert found.losses == pytest.approx(single.losses, rel=1e-4), name


def stop_at(folder: str, config: str, step: int) -> Outcome:
    """A run that is asked to stop (by a signal to rank 0) during its `step`-th step."""
    here = dist.world("cpu")
    made = ToyConfig.model_validate_json(config)
    program = toy_program(made, here)
    objective = program.objective

    def stopping(model, batch):
        if batch.step == step - 1 and here.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        return objective(model, batch)

    program.objective = stopping
    try:
        toy_fit(folder, made, program)
    except ResumeLater:
        return Outcome()
    raise AssertionError("the run was not stopped")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_at_the_same_world_size_is_bit_identical_in_every_stage(tmp_path: Path, stage: int) -> None:
    config = ToyConfig(steps=9, kind="joint", engine=zero(tmp_path, stage, checkpoint_every=100))
    run_distributed(stop_at, 2, str(tmp_path / "cut"), config.model_dump_json(), 4)
    assert (tmp_path / "cut" / "checkpoints" / "LATEST").read_text() == "step_00000004"
    both = run_distributed(several, 2, str(tmp_path), {name: config.model_dump_json() for name in ("cut", "whole")})[0]
    assert_same(both["cut"], both["whole"])
    ours, theirs = (CheckpointReader(tmp_path / name / "checkpoints" / "step_00000009") for name in ("cut", "whole"))
    for key in theirs.shapes:
        for part in ("weight", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(ours.read_full(part, key), theirs.read_full(part, key)), (part, key)


def test_a_run_goes_on_at_other_world_sizes_and_stages_on_the_same_loss_curve(tmp_path: Path) -> None:
    def config(settings) -> ToyConfig:
        return ToyConfig(steps=24, global_batch=12, kind="joint", optim=OPTIM, engine=settings)

    whole = toy_outcome(tmp_path / "whole", config(engine()))
    places = [
        (2, zero(tmp_path, 1)), (3, zero(tmp_path, 3)), (2, engine()), (2, zero(tmp_path, 2)), (3, zero(tmp_path, 1)),
    ]  # fmt: skip
    for leg, (world_size, settings) in enumerate(places):
        run_distributed(stop_at, world_size, str(tmp_path / "moved"), config(settings).model_dump_json(), 4 * (leg + 1))
    end = toy_outcome(tmp_path / "moved", config(engine()))  # and the last leg in a single process
    assert end.losses == pytest.approx(whole.losses, rel=1e-4)
    for key, weight in whole.weights.items():
        assert distance(end.weights[key], weight) < 1e-4, key


def same_from_everywhere(folder: str, configs: dict[str, str], saved: str) -> dict[str, dict[str, torch.Tensor]]:
    """What each backend gathers right after it loaded one checkpoint."""
    from fine_dist.engine.backends import make_backend
    from fine_dist.engine.checkpoint import restore_ema
    from fine_dist.engine.ema import Ema
    from tests.engine.toy import toy_model

    here = dist.world("cpu")
    found = {}
    for name, text in configs.items():
        config = ToyConfig.model_validate_json(text)
        backend = make_backend(
            toy_model(config), config.optim, config.engine, here, config.global_batch // here.world_size, 1
        )
        ema = Ema(backend, 0.9)
        checkpoint = CheckpointReader(Path(saved))
        backend.load(checkpoint)
        restore_ema(checkpoint, ema, backend.pieces())
        moments = backend.gather({p.name: backend.moments(p)["exp_avg_sq"] for p in backend.pieces()})
        found[name] = {
            **{f"weight {k}": v for k, v in backend.weights().items()},
            **{f"ema {k}": v for k, v in ema.gather().items()},
            **{f"moment {k}": v for k, v in moments.items()},
        }
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_backend_and_stage_gathers_the_very_bits_of_one_checkpoint(tmp_path: Path, world_size: int) -> None:
    start = ToyConfig(steps=3, kind="joint", global_batch=12)
    toy_fit(tmp_path / "start", start)
    saved = tmp_path / "start" / "checkpoints" / "step_00000003"
    configs = {"plain": start.model_dump_json()}
    for stage in (0, 1, 2, 3):
        settings = zero(tmp_path, stage)
        configs[f"ZeRO-{stage}"] = ToyConfig(**{**dict(start), "engine": settings}).model_dump_json()
    configs["FSDP2"] = ToyConfig(**{**dict(start), "engine": engine(backend="fsdp2")}).model_dump_json()
    settings = engine(backend="deepspeed", deepspeed={"stage": 2, "offload_optimizer": True})
    configs["ZeRO-2 offloaded"] = ToyConfig(**{**dict(start), "engine": settings}).model_dump_json()
    ranks = run_distributed(same_from_everywhere, world_size, str(tmp_path), configs, str(saved))
    checkpoint = CheckpointReader(saved)
    parts = {"weight": "weight", "ema": "ema", "moment": "exp_avg_sq"}
    for name, tensors in ranks[0].items():
        assert len(tensors) == 3 * len(checkpoint.shapes)
        for key, tensor in tensors.items():
            part, _, parameter = key.partition(" ")
            assert torch.equal(tensor.flatten(), checkpoint.read_full(parts[part], parameter)), (name, key)
        assert all(not rank[name] for rank in ranks[1:])  # whole tensors live on rank 0 only


def artifact_hashes(folder: str, run: str, configs: dict[str, str]) -> list[str]:
    """The hash of the model that each backend hands out at the end of one finished run."""
    hashes = []
    for name, text in configs.items():
        fitted = toy_fit(run, ToyConfig.model_validate_json(text))  # resumes at its end and trains nothing
        if fitted.world.is_main:
            tensors = {**fitted.model.state_dict(), **{f"ema.{key}": value for key, value in fitted.ema.items()}}
            save_artifact(Path(folder) / name, kind="model", method={}, arch=ARCH, tensors=tensors, extra={})
            hashes.append(load_artifact(Path(folder) / name).hash)
    return hashes


def test_the_artifact_of_a_run_is_the_same_bytes_from_every_backend_stage_and_world_size(tmp_path: Path) -> None:
    start = ToyConfig(steps=3, kind="joint", global_batch=12)
    toy_fit(tmp_path / "run", start)
    texts = {f"zero{s}": ToyConfig(**{**dict(start), "engine": zero(tmp_path, s)}).model_dump_json() for s in (1, 3)}
    texts["plain"] = start.model_dump_json()
    hashes = artifact_hashes(str(tmp_path / "1"), str(tmp_path / "run"), {"plain": texts["plain"]})
    for world_size in (2, 3):
        folder = str(tmp_path / str(world_size))
        hashes += run_distributed(artifact_hashes, world_size, folder, str(tmp_path / "run"), texts)[0]
    assert len(hashes) == 7 and len(set(hashes)) == 1


def test_bf16_and_offload_train_under_zero_as_in_one_process(tmp_path: Path) -> None:
    def config(settings) -> ToyConfig:
        return ToyConfig(steps=20, kind="joint", engine=settings)

    single = toy_outcome(tmp_path / "single", config(engine(precision="bf16")))
    exact = toy_outcome(tmp_path / "exact", config(engine()))
    offload = {"stage": 3, "offload_optimizer": True, "offload_params": True}
    configs = {
        "bf16, ZeRO-1": config(zero(tmp_path, 1, precision="bf16")),
        "bf16, ZeRO-3": config(zero(tmp_path, 3, precision="bf16")),
        "offload, ZeRO-3": config(engine(backend="deepspeed", deepspeed=offload)),
        "offload, ZeRO-2": config(engine(backend="deepspeed", deepspeed={"stage": 2, "offload_optimizer": True})),
    }
    texts = {name: c.model_dump_json() for name, c in configs.items()}
    found = run_distributed(several, 2, str(tmp_path / "found"), texts)[0]
    for name, outcome in found.items():
        # bf16 keeps 8 bits: products differ by up to 2^-8 when a batch is split, and the loss averages many of them.
        rel, reference = (1e-2, single) if "bf16" in name else (1e-4, exact)
        assert outcome.losses == pytest.approx(reference.losses, rel=rel), name
        assert all(math.isfinite(loss) for loss in outcome.losses)
        assert all(w.dtype == torch.float32 for w in outcome.weights.values())
