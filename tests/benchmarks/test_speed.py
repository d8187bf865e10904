"""What the speed benchmark measures is what it says: the references are the same model, the parts sum to the step."""

from __future__ import annotations

import re
import time

import pytest
import torch

from benchmarks import limit, speed, speed_plan, step_profile
from benchmarks.isolated_steps import isolated_rows, isolated_step
from benchmarks.reference_dit import EMA_DECAY, PlainDiT, diffusers_dit, follow, reference_step
from benchmarks.rows import BenchmarkRow
from benchmarks.steps import Bench, Step, StepKind
from fine_dist.artifacts.diffusers_export import forward_of, set_frequencies
from fine_dist.artifacts.diffusers_folder import to_diffusers
from fine_dist.model.arch import arch as named
from fine_dist.model.dit import DiT
from fine_dist.model.flops import train_flops
from tests.conftest import inputs, lively, tiny_arch

CPU = torch.device("cpu")


def test_the_plain_dit_computes_what_ours_does() -> None:
    arch = tiny_arch()
    ours, theirs = lively(DiT(arch), std=0.1), PlainDiT(arch).eval()
    state = {name.replace(".in.", ".up."): value for name, value in ours.state_dict().items()}
    state["patch.weight"] = state["patch.weight"].view_as(theirs.patch.weight)
    theirs.load_state_dict(state)
    # fp32 in another order of operations
    torch.testing.assert_close(theirs(*inputs(arch)), ours(*inputs(arch)), rtol=1e-4, atol=1e-5)


def test_diffusers_model_computes_what_ours_does() -> None:
    arch = tiny_arch()
    ours, theirs = lively(DiT(arch), std=0.1), diffusers_dit(arch)
    theirs.load_state_dict(to_diffusers(arch, ours.state_dict()))
    set_frequencies(theirs, arch.frequency_shift)
    torch.testing.assert_close(forward_of(theirs)(*inputs(arch)), ours(*inputs(arch)), rtol=1e-4, atol=1e-5)


def test_a_reference_step_trains_its_model() -> None:
    arch = tiny_arch(num_layers=2)
    model = lively(PlainDiT(arch))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = reference_step(model, model, arch, 4, "fp32", CPU)
    step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_average_of_a_reference_follows_its_model() -> None:
    average, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(average.weight)
    torch.nn.init.ones_(model.weight)
    follow(average, model)
    assert average.weight.item() == pytest.approx(1 - EMA_DECAY, rel=1e-3)


@pytest.mark.parametrize("kind", [StepKind("dense"), StepKind("stage 1", 32), StepKind("sigma", 16, joint=False)])
def test_parts_of_a_step_sum_to_it_and_each_is_seen(kind: StepKind) -> None:
    step = Bench(tiny_arch(num_layers=2), CPU, 2).step(kind, 4)
    step()
    began = time.perf_counter()
    found = step_profile.profile(step)
    took_ms = 1e3 * (time.perf_counter() - began)
    # no part twice: what is told is at most what passed
    assert 0 < sum(found.values()) <= took_ms
    both = ("GEMM", "attention", "norm and modulation", "GELU")
    for place in [(part, way) for part in both for way in ("forward", "backward")]:
        assert found[place] > 0, place
    assert all(found[part, ""] > 0 for part in ("optimiser", "EMA", "loss"))
    rows = step_profile.part_rows("x", [found])
    assert sum(row.share or 0.0 for row in rows) == pytest.approx(100)
    kept = sum(row.share or 0.0 for row in rows if re.search(r": (GEMM|attention),", row.measure))
    assert rows[-1].value == pytest.approx(100 - kept)


@pytest.mark.parametrize(
    ("names", "shapes", "part"),
    [
        (["aten::addmm", "aten::linear"], [[64, 32]], "GEMM"),
        (["aten::bmm", "aten::scaled_dot_product_attention"], [[8, 16, 16]], "attention"),
        (["aten::bmm", "Attention"], [[2, 16, 16]], "attention"),
        (["aten::_softmax", "aten::softmax", "AttentionBackward"], [[2, 16, 16]], "attention"),
        (["aten::addcmul", "GatedAdd"], [[16, 32]], "norm and modulation"),
        (["aten::mul", "SigmoidGelu"], [[2, 16, 128]], "GELU"),
        (["aten::mul"], [[2, 16, 128]], "GELU"),
        (["aten::mul"], [[2, 16, 32]], "norm and modulation"),
        (["aten::native_layer_norm", "aten::layer_norm"], [[2, 16, 32]], "norm and modulation"),
        (["aten::copy_", "aten::to"], [[2, 16, 32]], "casts and copies"),
        (["aten::mul", "FactoredProduct"], [[2, 16, 32]], "the rest"),
        (["aten::mul"], [[96, 32]], "the rest"),
    ],
)
def test_operations_are_told_by_name_surroundings_and_shape(names, shapes, part) -> None:
    assert step_profile.part_of(names, shapes, width=32) == part


def test_the_rate_of_products_is_flops_over_the_fastest_call() -> None:
    naps, took = iter([0.1, 0.03, 0.1]), []

    def nap() -> None:
        begun = time.perf_counter()
        time.sleep(next(naps))
        took.append(time.perf_counter() - begun)

    rate = limit.best_rate(nap, 1e9, CPU, seconds=0.0)
    assert len(took) == 2
    # the clock around a call reads a little more than the one inside it
    assert 0.5 * 1e9 / min(took) < rate <= 1e9 / min(took)


def test_the_bar_of_sigma_alone_is_the_aim_or_what_arithmetic_leaves() -> None:
    assert limit.sigma_bar(1, 0.70) == 0.93
    assert limit.sigma_bar(1, 0.88) == pytest.approx(0.96)
    assert limit.sigma_bar(4, 0.339) == 0.45


def test_a_step_counts_the_flops_of_what_trains() -> None:
    bench, arch = Bench(tiny_arch(), CPU, 1), tiny_arch()
    dense = bench.step(StepKind("dense"), 4).flops
    assert dense == pytest.approx(4 * train_flops(arch), rel=0.05)
    assert bench.step(StepKind("sigma", 8, joint=False), 4).flops < dense


def test_measuring_ends_when_the_seconds_are_over_and_takes_two_rounds_at_least() -> None:
    def nap() -> float:
        time.sleep(0.01)
        return 0.01

    bench = Bench(tiny_arch(), CPU, rounds=50)
    assert len(bench.times({"a": nap}, within_s=0.0)["a"]) == 2
    assert 2 < len(bench.times({"a": nap}, within_s=0.1)["a"]) < 50
    assert len(Bench(tiny_arch(), CPU, rounds=3).times({"a": nap}, None)["a"]) == 3


def test_the_rows_of_a_tiny_size_are_complete_and_have_no_bar() -> None:
    plan = speed_plan.SpeedPlan(tiny_arch(num_layers=2), 4, CPU, quick=True, own_size=False, seconds=0.1)
    rows = {row.measure: row for row in speed.steps_of(plan, "bf16")}
    assert all(row.bar is None and row.value >= 0 for row in rows.values())
    words = "\n".join(rows)
    for wanted in ("original-style DiT / ours", "DiTTransformer2DModel / ours", "share of the best square product",
                   "limit by multiply-adds", "room, all but GEMM and attention", "GELU, backward"):  # fmt: skip
        assert wanted in words, wanted


def test_steps_in_processes_of_their_own_are_timed_and_a_dead_one_is_an_error() -> None:
    plan = speed_plan.SpeedPlan(tiny_arch(num_layers=1), 2, CPU, quick=True, own_size=False, seconds=0.1)
    assert all(row.value > 0 and row.bar is None for row in isolated_rows(plan, "fp32"))
    with isolated_step("kept", plan, "no such precision") as step, pytest.raises((RuntimeError, BrokenPipeError)):
        step()


def test_bars_are_those_of_the_size_and_device_they_were_set_for() -> None:
    plan = speed_plan.SpeedPlan(named("DiT-S/2"), 16, CPU, quick=False, own_size=False, seconds=1.0)
    assert speed_plan.stage_1_row(plan, "fp32", 1.0, 0.9).bar == 1.10
    assert speed_plan.reference_row(plan, "original", "bf16", 1.0).bar == 1.25
    assert speed_plan.reference_row(plan, "original", "bf16", 1.0, "ours, compiled").bar == 1.30
    assert speed_plan.reference_row(plan, "diffusers", "bf16", 1.0).bar is None
    card = speed_plan.SpeedPlan(named("DiT-XL/2"), 32, torch.device("cuda"), quick=False, own_size=True, seconds=1.0)
    assert speed_plan.stage_1_row(card, "bf16", 1.0, 0.9).bar == 1.06
    assert speed_plan.reference_row(card, "original", "fp32", 1.0).bar is None


def test_a_share_is_printed_beside_its_figure(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import machine, show

    show([BenchmarkRow("x: GEMM, forward", 12.0, "ms", share=34.5)], {**machine(), "seconds": 0, "quick": False})
    assert "12 ms = 34.5%" in capsys.readouterr().out


def test_a_step_runs_its_parts_in_order() -> None:
    seen: list[str] = []
    step = Step(CPU, {name: lambda name=name: seen.append(name) for name in ("forward", "backward")})
    step()
    assert seen == ["forward", "backward"]
    step.warm()
    assert seen == ["forward", "backward"] * 2


def test_a_step_is_made_ready_by_one_sample_and_then_takes_its_own_batch() -> None:
    step = Bench(tiny_arch(num_layers=2), CPU, 1).step(StepKind("dense"), 3)
    seen: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: seen.append(len(given[0])) if isinstance(module, DiT) else None
    )
    try:
        step.warm()
        step()
    finally:
        hook.remove()
    assert seen == [1, 3]
