"""Stage 1 of every method: two processes under ZeRO and FSDP2 train what one process trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fine_dist.diffusion.objective import DiffusionLoss, FeatureDistillation, Objective, OutputDistillation, Teacher
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.methods import METHODS
from fine_dist.methods.stitching.pool import Pool
from fine_dist.testing import run_distributed
from tests.conftest import lively, tiny_arch
from tests.distributed.test_zero import OPTIM, distance, zero
from tests.engine.toy import Outcome, ToyConfig, ToyStream, engine, toy_fit, toy_program
from tests.methods.making import condensed, tiny, trained

pytestmark = pytest.mark.distributed

CONDENSING = [name for name in METHODS if tiny(name).traits.condenses]


def stage_1(folder: str, name: str, config: ToyConfig) -> Outcome:
    """A short run of a method's stage 1, on its own loss and made-up latents."""
    here = dist.world("cpu")
    method = tiny(name)
    condensation, _ = condensed(method)
    weights, pairs = method.traits.loss, condensation.pairs
    teacher = Teacher(trained(tiny_arch(num_layers=5)), [int(theirs.rpartition(".")[2]) for _, theirs in pairs])
    terms = [
        DiffusionLoss(make_process(DiffusionConfig()), weights.diffusion),
        OutputDistillation(teacher, weights.output),
        FeatureDistillation(teacher, pairs, weights.features),
    ]
    parts = {
        "model": lively(condensation.module, std=0.1),
        "objective": Objective(DiffusionConfig(), tiny_arch(), config.seed, terms),
        "stream": ToyStream(config.global_batch, here, tiny_arch()),
        "before_step": condensation.before_step,
    }
    fitted = toy_fit(folder, config, toy_program(config, here, **parts))
    if not fitted.world.is_main:
        return Outcome()
    numbers = {key: p.detach().clone() for key, p in fitted.model.named_parameters()}
    return Outcome([row["loss"] for row in fitted.rows if "loss" in row], numbers, fitted.ema)


def all_of_them(folder: str, configs: dict[int | str, str]) -> dict[tuple[str, int | str], Outcome]:
    """Every method at every stage of ZeRO and under FSDP2, one after the other in one world."""
    return {
        (name, stage): stage_1(f"{folder}/{name}-{stage}", name, ToyConfig.model_validate_json(text))
        for name in CONDENSING
        for stage, text in configs.items()
        if stage in stages_of(name)
    }


def stages_of(name: str) -> tuple[int | str, ...]:
    """Stages of ZeRO, and FSDP2, that equal one process.

    A path that is drawn for a step leaves parameters out. AdamW leaves those without a gradient alone; ZeRO-3 gives
    them a gradient of zero, and their moments still move them.
    """
    return (2, "fsdp2") if isinstance(condensed(tiny(name))[1], Pool) else (2, 3, "fsdp2")


def test_two_processes_that_share_the_weights_train_what_one_process_trains(tmp_path: Path) -> None:
    common = {"steps": 2, "global_batch": 6, "optim": OPTIM}
    sharded: dict[int | str, str] = {
        stage: ToyConfig(**common, engine=zero(tmp_path, stage, checkpoint_every=2)).model_dump_json()
        for stage in (2, 3)
    }
    sharded["fsdp2"] = ToyConfig(**common, engine=engine(backend="fsdp2", checkpoint_every=2)).model_dump_json()
    found = run_distributed(all_of_them, 2, str(tmp_path / "two"), sharded)[0]
    for name in CONDENSING:
        single = stage_1(str(tmp_path / "one" / name), name, ToyConfig(**common, engine=engine(checkpoint_every=2)))
        for stage in stages_of(name):
            two = found[name, stage]
            assert two.losses == pytest.approx(single.losses, rel=1e-5), (name, stage)
            assert two.weights.keys() == single.weights.keys()
            for key, weight in single.weights.items():
                # sums over two ranks in another order, two updates on
                assert distance(two.weights[key], weight) < 1e-5, (name, stage, key)
            for key, value in single.ema.items():
                assert distance(two.ema[key], value) < 1e-5, (name, stage, key)
            # an average that lags behind what moves, whatever a step's path leaves out
            assert any(not torch.equal(value, single.weights[key]) for key, value in single.ema.items())
