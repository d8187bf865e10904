"""What a method says that its models cost, against torch's own counter of what they really compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fine_dist.methods import METHODS
from tests.conftest import tiny_arch
from tests.methods.making import condensed, moved, parent_for, tiny

BATCH = 8


def counted(model: torch.nn.Module) -> tuple[float, float]:
    """FLOPs of a batch: (forward without gradients, forward and backward), on the mean of a pool's routes."""
    arch: Any = model.arch
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BATCH, *arch.latent_shape, generator=generator)
    t, y = torch.randint(1000, (BATCH,)), torch.randint(arch.num_classes, (BATCH,))
    pool: Any = getattr(model, "pool", model)
    forward, training = [], []
    for route in getattr(pool, "routes", [None]):
        if route is not None:
            pool.route = route
        # the counter knows the products that attention's plain form is made of, not a CPU's fused kernel
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(z, t, y)
            forward.append(counter.get_total_flops())
            with FlopCounterMode(display=False) as counter:
                out = model(z, t, y)
                getattr(out, "out", out).square().mean().backward()
            training.append(counter.get_total_flops())
    return sum(forward) / len(forward), sum(training) / len(training)


@pytest.mark.parametrize("name", METHODS)
def test_a_targets_cost_is_what_torch_counts(name: str) -> None:
    method, parent = tiny(name), parent_for(name)
    model = moved(method.descend(parent, parent.arch if parent else tiny_arch(), torch.Generator().manual_seed(0)))
    cost, (forward, training) = method.cost(model, BATCH), counted(model)
    assert BATCH * cost.forward == pytest.approx(forward, rel=2e-3)
    # counted too many are the gradients of the first block's input and of the conditioning, which frozen embedders do
    # not need: at this size up to 4%
    assert 1 - 1e-6 < BATCH * cost.training / training < 1.04


@pytest.mark.parametrize("name", [name for name in METHODS if tiny(name).traits.condenses])
def test_the_cost_of_stage_1_is_what_torch_counts(name: str) -> None:
    method = tiny(name)
    condensation, kept = condensed(method)
    _, training = counted(condensation.module)
    assert 1 - 1e-6 < BATCH * method.cost(condensation.module, BATCH).training / training < 1.05
    forward, _ = counted(kept)
    # making TLEG's weights is elementwise, which the method counts and torch's counter does not: 1% at this size
    assert BATCH * method.cost(kept, BATCH).forward == pytest.approx(forward, rel=0.011)
