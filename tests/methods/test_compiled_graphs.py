"""How many graphs torch.compile makes of a method's blocks: few, however many layers there are."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from fine_dist.engine.compiling import compile_or_fall_back
from fine_dist.methods import METHODS
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import condensed, moved, parent_for, tiny

DEEP = 10
"""More layers than the 8 graphs after which torch stops compiling a function."""
CONDENSING = [name for name in METHODS if tiny(name).traits.condenses]
DESCENDING = [name for name in METHODS if tiny(name).traits.parents != ("none",)]
STAGE_1 = {"tleg": {"auxiliary_layers": DEEP}, "sws": {"stages": (3, 3, 4)}}


def graphs_of(model: torch.nn.Module, *batch: torch.Tensor) -> int:
    """Graphs made in a forward and backward pass of compiled blocks, whose output must stay that of eager ones."""
    torch._dynamo.reset()
    counters.clear()
    expected = model(*batch)
    compile_or_fall_back(list(model.blocks), backend="eager")  # type: ignore[arg-type]
    out = model(*batch)
    out = getattr(out, "out", out)
    torch.testing.assert_close(out, getattr(expected, "out", expected))
    if out.requires_grad:
        out.square().mean().backward()
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", CONDENSING)
def test_stage_1_compiles_at_most_three_graphs_at_any_depth(name: str) -> None:
    method = tiny(name, **STAGE_1.get(name, {}))
    condensation, _ = condensed(method, tiny_arch(num_layers=DEEP))
    assert 1 <= graphs_of(lively(condensation.module), *inputs(tiny_arch())) <= 3


@pytest.mark.parametrize("name", DESCENDING)
def test_a_target_compiles_at_most_three_graphs_at_any_depth(name: str) -> None:
    method, parent = tiny(name), parent_for(name)
    assert parent is not None
    deep = "depth" in method.traits.varies and name != "weight_selection"
    target = parent.arch.with_depth(DEEP) if deep else parent.arch
    model = moved(method.descend(parent, target, torch.Generator().manual_seed(0)))
    assert 1 <= graphs_of(model, *inputs(target)) <= 3
