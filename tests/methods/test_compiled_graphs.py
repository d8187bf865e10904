"""torch.compile makes few graphs of a method's blocks, however many layers there are.

What differs between layers must be a tensor: torch compiles a function again for every other number, and gives it up
after eight graphs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from fine_dist.artifacts.targets import descend
from fine_dist.engine.compiling import compile_or_fall_back
from fine_dist.methods import METHODS
from tests.conftest import inputs, tiny_arch
from tests.methods import making

DEPTH, MOST = 12, 3
"""Layers; graphs of a method's stage: one for each width in LearngenePool, which trains three."""
DEEP: dict[str, dict[str, Any]] = {"tleg": {"auxiliary_layers": DEPTH}, "sws": {"stages": (3, 3, 3, 3)}}
STAGES = [(name, stage) for name in METHODS for stage in (1, 2) if stage == 2 or making.tiny(name).traits.condenses]


def stage_of(name: str, stage: int) -> tuple[torch.nn.Module, Any, Any]:
    """What a stage trains, what happens before its steps, and its architecture."""
    method = making.tiny(name, **(DEEP.get(name, {}) if stage == 1 else {}))
    if stage == 1:
        condensation, _ = making.condensed(method, tiny_arch(num_layers=DEPTH))
        return condensation.module, condensation.before_step, condensation.module.arch
    targets = making.CASES[name].targets()
    arch = tiny_arch(num_layers=DEPTH) if "L6" in targets else list(targets.values())[-1]
    made = descend(method, making.parent_for(name), arch, 0)
    if made.trains in ("all", "nothing"):
        made.model.requires_grad_(True)
    return made.model, method.before_step(made.model), arch


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_blocks_of_all_layers_share_few_graphs(name: str, stage: int, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    model, before_step, arch = stage_of(name, stage)
    compile_or_fall_back(list(model.blocks), backend)
    for step in range(3):
        if before_step:
            before_step(step, torch.Generator().manual_seed(step))
        out = model(*inputs(arch, 3))
        getattr(out, "out", out).square().mean().backward()
    torch._dynamo.reset()
    assert "torch.compile failed" not in caplog.text
    assert len(graphs) <= MOST, f"{len(graphs)} graphs; breaks: {dict(counters['graph_break'])}"
