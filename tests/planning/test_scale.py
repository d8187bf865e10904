"""The model of scale: its arithmetic against a ring walked hop by hop, and what it says is sent against the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fine_dist.core.errors import ConfigError
from fine_dist.engine.deepspeed_json import LIVE
from fine_dist.plan import main
from fine_dist.planning.memory import Groups, groups_of
from fine_dist.planning.scaling import shares
from fine_dist.planning.scaling_model import (
    SIZE,
    Affine,
    Link,
    Message,
    Network,
    Parts,
    counts,
    messages,
    predict,
    ring_s,
)
from fine_dist.testing import run_distributed

FAST, SLOW = Link(100e9, 1e-6), Link(10e9, 20e-6)
PARTS = Parts(Affine(0.01, 0.002), Affine(0.02, 0.004), 0.05, 0.001, 10_000_000, 40)


def walk(kind: str, size: float, processes: int, link: Link) -> float:
    """A ring, hop by hop: every process passes a P-th of the bytes on, and the hop ends when the slowest has."""
    rounds = 2 if kind == "all_reduce" else 1
    return sum(link.latency_s + size / processes / link.bytes_per_s for _ in range(rounds * (processes - 1)))


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize(("processes", "link"), [(2, FAST), (8, FAST), (9, SLOW), (64, SLOW)])
def test_a_collective_takes_as_long_as_its_ring_walked_hop_by_hop(kind, processes, link):
    network = Network(FAST, SLOW, per_node=8)  # a ring of nine leaves its node
    once = ring_s(Message(kind, 1000, 1), network, processes)
    assert once == pytest.approx(walk(kind, 1000 * SIZE, processes, link), rel=1e-12)
    in_parts = ring_s(Message(kind, 1000, 4), network, processes)
    assert in_parts == pytest.approx(4 * walk(kind, 250 * SIZE, processes, link), rel=1e-12)


def test_a_step_is_its_parts_and_only_zero_divides_the_optimizer():
    free = Network(Link(float("inf"), 0.0), Link(float("inf"), 0.0))
    passes = 2 * (0.01 + 0.002 * 4) + 2 * (0.02 + 0.004 * 4)
    plain, sharded = (predict(PARTS, stage, free, 5, 4, 2) for stage in (0, 1))
    assert plain.step_s == pytest.approx(passes + 0.001 + 0.05) and plain.efficiency == pytest.approx(1.0)
    assert sharded.step_s == pytest.approx(passes + 0.001 + 0.05 / 5)
    assert plain.batch == 5 * 4 * 2 and plain.images_per_s == pytest.approx(40 / plain.step_s)
    assert predict(PARTS, 0, free, 4, 4, slowdown=2.0).step_s == pytest.approx(2 * predict(PARTS, 0, free, 1, 4).step_s)


def test_communication_hides_behind_no_more_than_the_share_of_the_pass_that_is_stated():
    network = Network(SLOW, SLOW)
    seen = predict(PARTS, 2, network, 8, 1)
    some = predict(PARTS, 2, network, 8, 1, overlap=0.5)
    assert seen.hidden_s == 0 and some.hidden_s == pytest.approx(
        min(0.5 * 0.024, ring_s(messages(2, PARTS, 1)[0], network, 8))
    )
    assert some.step_s == pytest.approx(seen.step_s - some.hidden_s)
    # what is gathered after the update has no pass to overlap with
    endless = predict(Parts(**{**vars(PARTS), "backward": Affine(1e9, 0.0)}), 2, network, 8, 1, overlap=1.0)
    assert endless.communication_s - endless.hidden_s > ring_s(messages(2, PARTS, 1)[1], network, 8)
    plain = predict(PARTS, 0, network, 8, 1, overlap=1.0)
    assert plain.hidden_s == pytest.approx(min(0.048, ring_s(messages(0, PARTS, 1)[0], network, 8)))


def test_zero_3_gathers_again_only_what_it_may_not_keep():
    small, large = PARTS, Parts(**{**vars(PARTS), "trained": 3 * LIVE})
    assert sum(m.numbers for m in messages(3, small, 1) if m.kind == "all_gather") == small.trained
    assert sum(m.numbers for m in messages(3, large, 1) if m.kind == "all_gather") == 2 * large.trained - LIVE


def test_fsdp2_gathers_blocks_twice_and_the_root_once_and_bf16_halves_that_alone():
    # three blocks of 1,000 numbers, of which 60 train each, and 500 trained ones at the root
    groups = Groups(3, 3000, 500, 3, True)
    parts = Parts(**{**vars(PARTS), "trained": 680, "groups": groups})
    found = messages("fsdp2", parts, accumulation=2)
    gathers = [m for m in found if m.kind == "all_gather"]
    assert sum(m.numbers for m in gathers) == 2 * (3000 + 500 + 3000) and sum(m.times for m in gathers) == 2 * 7
    [summed] = [m for m in found if m.kind == "reduce_scatter"]
    assert (summed.numbers, summed.times) == (2 * 680, 2 * 4)
    half = messages("fsdp2", parts, accumulation=2, gathered=0.5)
    assert sum(m.numbers for m in half if m.kind == "all_gather") == 2 * 6500 / 2 and half[-1] == summed
    whole = predict(parts, "fsdp2", Network(SLOW, SLOW), 8, 1)
    assert whole.sent_bytes == pytest.approx(7 / 8 * SIZE * (6500 + 680) + 2 * 7 / 8 * SIZE * 4 * 9)
    assert whole.compute_s < predict(parts, 0, Network(SLOW, SLOW), 8, 1).compute_s  # the optimizer is divided


def test_a_share_of_the_batch_or_the_batch_is_held():
    assert shares(64, None, 8, (8, 512), "process") == {8: (8, 1), 512: (8, 1)}
    assert shares(64, 4, 8, (8, 16), "batch") == {8: (4, 2), 16: (4, 1)}
    with pytest.raises(ConfigError, match="64 cannot be divided over 512"):
        shares(64, None, 8, (8, 512), "batch")


# --- what the engine really sends ------------------------------------------------------------------------------------


def sent(stages: list[Any]) -> dict[Any, dict[str, list[int]]]:
    """{stage: {collective: [calls, numbers]}} of one step, counted where torch is asked for it."""
    import torch.distributed as td

    counted: dict[str, list[int]] = {}

    def counting(name: str, known_as: str) -> Any:
        inner = getattr(td, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(("first", "second"), args)), **kwargs}
            tensors = [value for value in given.values() if torch.is_tensor(value)]
            size = max(tensor.numel() for tensor in tensors)  # the whole: an all-gather's result
            if size > 2:  # but for norms
                calls = counted.setdefault(known_as, [0, 0])
                calls[0] += 1
                calls[1] += size
            return inner(*args, **kwargs)

        return call

    # FSDP2 asks newer torch for the same under other names
    newer = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
    for name in ("all_reduce", *newer.values(), *newer):
        if hasattr(td, name):
            setattr(td, name, counting(name, newer.get(name, name)))
    from fine_dist.engine import dist
    from fine_dist.engine.backends import make_backend
    from tests.engine.toy import ToyConfig, ToyStream, engine, toy_model

    world, found = dist.world("cpu"), {}
    for stage in stages:
        config = ToyConfig(kind="joint", global_batch=8)
        settings = engine()
        if stage:
            zero = {"backend": "deepspeed", "deepspeed": {"stage": stage}}
            settings = engine(**({"backend": "fsdp2"} if stage == "fsdp2" else zero))
        model = toy_model(config)
        backend = make_backend(model, config.optim, settings, world, 2, 2)
        from fine_dist.diffusion.objective import Objective
        from fine_dist.diffusion.settings import DiffusionConfig
        from tests.engine.toy import ARCH

        objective = Objective(DiffusionConfig(), ARCH, 0)
        batch = next(ToyStream(8, world).batches())
        for _ in range(3):  # ZeRO-3 learns the order of its parameters in the first
            counted.clear()
            for last in (False, True):
                losses = objective(backend.model, batch.part(2 * last, 2))
                backend.backward(losses, global_batch=8, last=last)
            backend.step(1e-4)
        found[stage] = {name: list(calls) for name, calls in counted.items()}
    return found


@pytest.mark.distributed
def test_the_model_sends_what_the_engine_sends():
    from tests.engine.toy import ToyConfig, toy_model

    model = toy_model(ToyConfig(kind="joint"))
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = Parts(Affine(0, 0), Affine(0, 0), 0, 0, *counts(trained), groups_of(model))
    names = {
        "all_reduce": "all_reduce",
        "all_gather": "all_gather_into_tensor",
        "reduce_scatter": "reduce_scatter_tensor",
    }
    counted = run_distributed(sent, 2, [0, 1, 2, 3, "fsdp2"], timeout_s=300)[0]
    for stage, found in counted.items():
        expected: dict[str, list[float]] = {}
        for message in messages(stage, parts, accumulation=2, grouped=False):
            calls = expected.setdefault(names[message.kind], [0, 0])
            calls[0] += message.times
            calls[1] += message.numbers
        assert found.keys() == expected.keys(), stage
        for name, (calls, numbers) in expected.items():
            # tensors are padded to a multiple of the processes
            assert found[name][1] == pytest.approx(numbers, rel=0.01), (stage, name)
            assert found[name][0] == calls, (stage, name)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "condense.yaml"
    arch = (
        "{hidden_size: 32, num_layers: 2, num_heads: 2, patch_size: 2, in_channels: 1, input_size: 8, num_classes: 10}"
    )
    path.write_text(f"arch: {arch}\nbatch: 16\nlaunch: {{processes: 8}}\n")
    return ["--stage", "condense", "--config", str(path)]


def test_the_command_predicts_both_models_at_every_stage_and_reads_its_own_parts_back(config, tmp_path, capsys):
    assert main([*config, "--scale", "64", "8", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert "measured here" in first["measured"] and len(first["parts"]) == 2
    ours, theirs = first["parts"].values()
    assert 0 < ours["trained"] < theirs["trained"]
    assert all(parts["forward"]["sample"] > 0 and parts["per_number_s"] > 0 for parts in (ours, theirs))
    made = first["predictions"]
    assert len(made) == 2 * 5 * 2 and [p["processes"] for p in made[:2]] == [8, 64]
    assert all(p["micro"] == 2 and p["step_s"] > p["compute_s"] for p in made)
    dense = {p["stage"]: p["memory_bytes"] for p in made if p["label"].startswith("its") and p["processes"] == 64}
    # Weights, gradients and moments are divided. Plain and ZeRO-1 are not compared: plain divides the averages as well,
    # and of so small a model ZeRO-1's reduction buffers outweigh the moments that it saves.
    assert dense["fsdp2"] < min(dense[0], dense[1])
    kept = tmp_path / "parts.json"
    kept.write_text(json.dumps(first))
    picture = tmp_path / "curve.svg"
    asked = [*config, "--scale", "8", "64", "--parts", str(kept)]
    assert main([*asked, "--json", "--out", str(picture)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["predictions"] == made and f"given by {kept}" in again["measured"]
    assert "<svg" in picture.read_text()
    # a link ten times as slow: more communication, the same volume and the same passes
    assert main([*asked, "--json", "--bandwidth", "15", "2.5", "--latency", "50", "150"]) == 0
    for slow, fast in zip(json.loads(capsys.readouterr().out)["predictions"], made):
        assert slow["communication_s"] == pytest.approx(10 * fast["communication_s"])
        assert slow["sent_bytes"] == fast["sent_bytes"] and slow["compute_s"] == fast["compute_s"]
    assert main([*asked, "--cores", "2"]) == 0
    shown = capsys.readouterr().out
    assert "8 processes of a node share 2 cores" in shown and "efficiency" in shown and "100% |" in shown
    assert f"{theirs['trained'] / ours['trained']:.1f} times as many" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scale", "0"], "--scale: 0; give 1 or more"),
        (["--scale", "8", "8"], "a number is given twice"),
        (["--scale", "8", "--zero", "4"], "--zero: 4; legal: 0, 1, 2, 3, fsdp2"),
        (["--scale", "8", "--zero", "fsdp3"], "--zero: fsdp3; legal: 0, 1, 2, 3, fsdp2"),
        (["--scale", "8", "--bandwidth", "0", "25"], "--bandwidth: 0; give two numbers above 0"),
        (["--scale", "8", "--latency", "-1", "2"], "--latency: -1"),
        (["--scale", "8", "--overlap", "1.5"], "--overlap: 1.5; give a share"),
        (["--scale", "8", "--per-node", "0"], "--per-node: 0; give 1 or more"),
        (["--scale", "32", "--gloo"], "--gloo: measures at most 16 local processes"),
        (
            ["--scale", "8", "--out", "curve.txt"],
            "--out curve.txt: the name of a figure ends in one of .png, .svg, .pdf",
        ),
        (["--scale", "8", "--parts", "no.json"], "--parts no.json: No such file"),
        (["--scale", "64", "--hold", "batch"], "global batch 16 cannot be divided over 64"),
        (["--overlap", "0.5"], "--overlap: needs --scale P"),
    ],
)
def test_a_wrong_flag_is_one_message(config, flags, words, capsys):
    assert main([*config, *flags]) == 2
    assert words in capsys.readouterr().err


def test_parts_of_another_model_and_a_config_of_no_training_stage_are_refused(config, tmp_path, capsys):
    (tmp_path / "odd.json").write_text('{"measured": "there", "parts": {}}')
    assert main([*config, "--scale", "8", "--parts", str(tmp_path / "odd.json")]) == 2
    assert "'FINE stage 1' is not in the file" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text("[1]")
    assert main([*config, "--scale", "8", "--parts", str(tmp_path / "odd.json")]) == 2
    assert "not what `plan --scale P --json` prints" in capsys.readouterr().err
    (tmp_path / "init.yaml").write_text("depths: [2]\n")
    assert main(["--stage", "init", "--config", str(tmp_path / "init.yaml"), "--scale", "8"]) == 2
    assert "predicts stages that train one model" in capsys.readouterr().err


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_a_run_whose_processes_cost_nothing_to_each_other_is_predicted_to_last_as_long_as_one():
    from benchmarks.scale import prediction

    run = {"forward": 0.02, "backward": 0.04, "numbers": 0.01, "step": 0.08, "joined": 0.0,
           "trained": 1e6, "tensors": 10.0, "small": 0.0, "small_tensors": 0.0}  # fmt: skip
    one = {"kernel_s": 0.01, "runs": {"dense 0": run, "dense 1": run}}
    free = {"kernel_s": 0.01, "links": {kind: [1e30, 0.0] for kind in ("all_reduce", "all_gather", "reduce_scatter")}}
    assert prediction(one, free, "dense", 0, 4).step_s == pytest.approx(0.08)
    # two processes on each core, and an optimizer that four share
    shared = prediction(one, {**free, "kernel_s": 0.02}, "dense", 1, 4)
    assert shared.step_s == pytest.approx(2 * (0.08 - 0.01 * 3 / 4))
    # 4 MB around a ring of four at 1 GB/s: six hops of 1 MB
    slow = {**free, "links": {**free["links"], "all_reduce": [1e9, 0.0]}}
    assert prediction(one, slow, "dense", 0, 4).step_s == pytest.approx(0.08 + 6e-3, rel=1e-3)


def test_a_ratio_is_near_one_on_both_sides_of_it():
    from benchmarks.rows import BenchmarkRow

    passed = {
        value: BenchmarkRow("predicted / measured", value, "x", 1.2, "near").passed
        for value in (0.79, 0.8, 1.0, 1.2, 1.21)
    }
    assert passed == {0.79: False, 0.8: True, 1.0: True, 1.2: True, 1.21: False}
