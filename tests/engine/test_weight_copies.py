"""Products that read bf16 copies of the weights compute what autocast computes; all else sees fp32 weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fine_dist.engine.compiling import prepare_model
from fine_dist.engine.weight_copies import WeightCopies, multiplied
from fine_dist.model.dit import DiT
from fine_dist.testing import run_distributed
from tests.conftest import inputs, lively, tiny_arch
from tests.engine.toy import Outcome, ToyConfig, engine, toy_model, toy_outcome


def run(folder: Path, kind: str, copies: bool, **settings) -> Outcome:
    settings = {"precision": "bf16", "bf16_copies": copies, "compile": False, **settings}
    return toy_outcome(folder, ToyConfig(kind=kind, steps=4, engine=engine(**settings)))


def assert_same_bits(ours: Outcome, theirs: Outcome) -> None:
    assert ours.losses == theirs.losses and len(ours.losses) == 4
    for mine, other in ((ours.weights, theirs.weights), (ours.ema, theirs.ema)):
        assert {name: tensor.dtype for name, tensor in mine.items()} == dict.fromkeys(other, torch.float32)
        assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 2}, {"activation_checkpointing": "blocks"}], ids=str)
def test_a_dense_model_trains_to_the_same_bits_with_copies_as_with_autocasts_casts(tmp_path: Path, settings) -> None:
    assert_same_bits(
        run(tmp_path / "copies", "dense", True, **settings), run(tmp_path / "casts", "dense", False, **settings)
    )


@pytest.mark.parametrize("kind", ["joint", "sigma"])
def test_shared_genes_follow_the_curve_of_autocast(tmp_path: Path, kind: str) -> None:
    ours, theirs = run(tmp_path / "copies", kind, True), run(tmp_path / "casts", kind, False)
    assert ours.losses == pytest.approx(theirs.losses, rel=5e-3)  # U is rounded before it is multiplied by sigma
    assert ours.losses[-1] != ours.losses[0]


def two_ranks(folder: str, copies: bool) -> Outcome:
    return run(Path(folder), "dense", copies, micro_batch=2)


@pytest.mark.distributed
def test_two_ranks_sum_the_gradients_of_copies(tmp_path: Path) -> None:
    ours, theirs = (run_distributed(two_ranks, 2, str(tmp_path / str(copies)), copies)[0] for copies in (True, False))
    assert_same_bits(ours, theirs)


def test_the_model_holds_copies_while_it_computes_and_fp32_weights_at_all_other_times() -> None:
    model = toy_model(ToyConfig(kind="sigma"))
    before = {name: p for name, p in model.named_parameters()}
    copies = WeightCopies(model)
    with pytest.raises(RuntimeError, match="on purpose"), copies.installed():
        inside = dict(model.named_parameters())
        raise RuntimeError("on purpose")
    assert all(p is before[name] for name, p in model.named_parameters())
    kinds = {name: p.dtype for name, p in inside.items()}
    assert kinds["genes.qkv.U"] == kinds["blocks.0.o.bias"] == kinds["final.linear.weight"] == torch.bfloat16
    assert kinds["blocks.0.qkv.sigma"] == kinds["label.weight"] == torch.float32
    assert [p.requires_grad for p in inside.values()] == [p.requires_grad for p in before.values()]


def test_copies_are_made_of_what_products_alone_use() -> None:
    names = {name for _, name, _ in multiplied(toy_model(ToyConfig(kind="joint")))}
    assert names == {"U", "V", "weight", "bias"}


def test_a_bf16_residual_stream_keeps_fewer_bytes_and_changes_the_output_by_rounding_alone() -> None:
    found, kept = [], []
    for dtype in ("fp32", "bf16"):
        model = lively(DiT(tiny_arch(num_layers=4)))
        prepare_model(model, engine(precision="bf16", residual_dtype=dtype, compile=False), torch.device("cpu"))
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.nbytes), x)[1], lambda x: x)
        with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
            found.append(model(*inputs(model.arch, 4)).float())
        kept.append(sum(sizes))
    assert 0 < float((found[1] - found[0]).norm() / found[0].norm()) < 0.02
    assert kept[1] < 0.85 * kept[0]


def test_a_bf16_residual_stream_of_an_fp32_run_is_refused() -> None:
    with pytest.raises(ValidationError, match="residual_dtype bf16 needs precision bf16"):
        engine(residual_dtype="bf16")
