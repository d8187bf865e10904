"""torch's FSDP2 behind the loop's interface: the curve of the plain backend, and the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fine_dist.core.errors import ConfigError
from fine_dist.engine import dist
from fine_dist.engine.backends import make_backend
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.testing import run_distributed
from tests.engine.test_loop import nan_at
from tests.engine.toy import Outcome, ToyConfig, engine, toy_fit, toy_outcome, toy_program

pytestmark = pytest.mark.distributed


def fsdp(**fields: Any):
    return engine(backend="fsdp2", **fields)


def several(folder: str, configs: dict[str, str]) -> dict[str, Outcome]:
    """Runs of one start of the processes."""
    return {name: toy_outcome(f"{folder}/{name}", ToyConfig.model_validate_json(c)) for name, c in configs.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_weights_and_averages_are_those_of_the_plain_backend(tmp_path: Path, world_size: int) -> None:
    """Three processes share no number of rows evenly, and a parameter of one row leaves two of them without any."""
    shared = {"steps": 5, "global_batch": 12}
    configs = {kind: ToyConfig(kind=kind, engine=fsdp(micro_batch=2), **shared) for kind in ("dense", "joint", "sigma")}
    configs["recomputed"] = ToyConfig(kind="joint", engine=fsdp(activation_checkpointing="blocks"), **shared)
    texts = {name: config.model_dump_json() for name, config in configs.items()}
    found = run_distributed(several, world_size, str(tmp_path), texts)[0]
    for name, config in configs.items():
        plain = toy_outcome(tmp_path / f"plain {name}", config.model_copy(update={"engine": engine()}))
        assert found[name].losses == pytest.approx(plain.losses, rel=1e-6)
        assert found[name].weights.keys() == plain.weights.keys() and found[name].ema.keys() == plain.ema.keys()
        for key, weight in plain.weights.items():
            # the key's bias has no gradient but rounding, and AdamW makes a step of 1e-3 of any sign of it
            torch.testing.assert_close(found[name].weights[key], weight, rtol=1e-4, atol=2e-5)


def test_a_run_that_moves_between_backends_and_world_sizes_goes_on_along_one_curve(tmp_path: Path) -> None:
    def config(steps: int, **choice: Any) -> ToyConfig:
        return ToyConfig(kind="joint", steps=steps, global_batch=12, engine=engine(checkpoint_every=100, **choice))

    whole = toy_outcome(tmp_path / "whole", config(15))
    legs = [
        (2, {"backend": "fsdp2"}),
        (3, {"backend": "fsdp2"}),
        (2, {"backend": "deepspeed"}),
        (1, {"backend": "fsdp2"}),
    ]
    for leg, (world_size, choice) in enumerate(legs):
        run_distributed(toy_outcome, world_size, str(tmp_path / "moved"), config(3 * (leg + 1), **choice))
    end = toy_outcome(tmp_path / "moved", config(15))
    assert end.losses == pytest.approx(whole.losses, rel=1e-5)


def resumed_and_whole(folder: str) -> tuple[Outcome, Outcome]:
    config = ToyConfig(kind="joint", steps=6, engine=fsdp())
    toy_outcome(f"{folder}/twice", config.model_copy(update={"steps": 4}))
    return toy_outcome(f"{folder}/twice", config), toy_outcome(f"{folder}/whole", config)


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    twice, whole = run_distributed(resumed_and_whole, 2, str(tmp_path))[0]
    assert twice.losses == whole.losses
    assert all(torch.equal(twice.weights[name], weight) for name, weight in whole.weights.items())


def after_a_bad_step(folder: str) -> float:
    """The largest change of a weight in a step whose loss is not finite on every rank."""
    ends = []
    for steps in (2, 3):
        config = ToyConfig(steps=steps, engine=fsdp(on_bad_loss="skip"))
        here = dist.world("cpu")
        program = toy_program(config, here, stream=nan_at(2, here))
        ends.append(toy_fit(f"{folder}/{steps}", config, program).model)
    if dist.world("cpu").rank:
        return 0.0
    return max(float((p - q).abs().max()) for p, q in zip(*(model.parameters() for model in ends)))


def test_a_bad_step_changes_nothing(tmp_path: Path) -> None:
    assert run_distributed(after_a_bad_step, 2, str(tmp_path)) == [0.0, 0.0]


def test_a_rank_holds_its_share_and_a_checkpoint_has_every_value_once(tmp_path: Path) -> None:
    config = ToyConfig(kind="joint", steps=1, engine=fsdp(checkpoint_every=1))
    run_distributed(toy_outcome, 2, str(tmp_path), config)
    folder = tmp_path / "checkpoints" / "step_00000001"
    sizes = [(folder / f"rank{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert min(sizes) > 0.45 * sum(sizes)
    checkpoint = CheckpointReader(folder)
    for name, shape in checkpoint.shapes.items():
        assert checkpoint.read_full("exp_avg_sq", name).numel() == torch.Size(shape).numel()


def test_a_parameter_without_dimensions_is_refused_by_its_name() -> None:
    model = torch.nn.Linear(2, 2)
    model.gain = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(
        ConfigError, match=r"fsdp2 cannot shard parameters without dimensions \(gain\); legal here: plain"
    ):
        make_backend(model, ToyConfig().optim, fsdp(), dist.single_process("cpu"), 1, 1)
    dist.leave()


def gathered(folder: str, configs: dict[str, str]) -> tuple[dict[str, Outcome], set[torch.dtype]]:
    """Runs of one start of the processes, and the dtypes in which weights travelled."""
    seen: set[torch.dtype] = set()

    def counting(inner: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.update(x.dtype for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.numel() > 64)
            return inner(*args, **kwargs)

        return call

    for name in ("all_gather_into_tensor", "all_gather_single"):  # the second is newer torch's name
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
    return several(folder, configs), seen


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_gathered_in_bf16_follow_bf16s_curve_and_are_kept_in_fp32(tmp_path: Path, world_size: int) -> None:
    shared = {"steps": 6, "global_batch": 12}
    engines = {"plain": engine(precision="bf16"), "half": fsdp(precision="bf16", gather_dtype="bf16", micro_batch=3)}
    for kind in ("dense", "joint"):
        config = {name: ToyConfig(kind=kind, engine=chosen, **shared) for name, chosen in engines.items()}
        plain = toy_outcome(tmp_path / f"{kind} plain", config["plain"])
        texts = {"half": config["half"].model_dump_json()}
        found, dtypes = run_distributed(gathered, world_size, str(tmp_path / kind), texts)[0]
        # bf16 keeps 8 bits: embeddings and biases, which autocast leaves in fp32, are rounded as well
        assert found["half"].losses == pytest.approx(plain.losses, rel=2e-2)
        assert all(weight.dtype == torch.float32 for weight in found["half"].weights.values())
        rounded = [torch.equal(w, w.bfloat16().float()) for w in found["half"].weights.values() if w.numel() > 1]
        assert not any(rounded)  # the shards that AdamW updates keep all their bits
        assert world_size == 1 or dtypes == {torch.bfloat16}


@pytest.mark.parametrize("choice", [{"backend": "plain", "precision": "bf16"}, {"backend": "fsdp2"}])
def test_gathering_in_bf16_needs_fsdp2_and_bf16(choice: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="gather_dtype bf16 needs backend fsdp2 and precision bf16"):
        engine(gather_dtype="bf16", **choice)


def compiled(folder: str, config: str) -> tuple[Outcome, int]:
    """A run, and how often a compiled block was made."""
    from fine_dist.engine import compiling

    made: list[Any] = []
    inner = compiling.compile_or_fall_back

    def counting(blocks: list[torch.nn.Module]) -> None:
        inner(blocks, backend="eager")
        made.extend(blocks)

    compiling.compile_or_fall_back = counting
    return toy_outcome(folder, ToyConfig.model_validate_json(config)), len(made)


def test_blocks_are_compiled_under_fsdp2_where_that_is_asked_for(tmp_path: Path) -> None:
    plain = toy_outcome(tmp_path / "plain", ToyConfig(steps=3, global_batch=12))
    for choice, blocks in ((True, 2), (None, 0)):
        config = ToyConfig(steps=3, global_batch=12, engine=fsdp(compile=choice)).model_dump_json()
        found, count = run_distributed(compiled, 2, str(tmp_path / str(choice)), config)[0]
        assert count == blocks and found.losses == pytest.approx(plain.losses, rel=1e-6)
