"""Where sigma starts: what the starts keep of the learngene, and that they need no training to be near it."""

from __future__ import annotations

import pytest
import torch

from fine_dist.methods import build, parent_of
from fine_dist.methods.fine.config import FineConfig
from fine_dist.model.artifact import Artifact
from fine_dist.model.depth import INITIALS, nearest_layers, segment_mean, segment_share
from fine_dist.model.factors import FactoredDiT
from tests.conftest import inputs, lively, tiny_arch

L = 8


def naive_segment_mean(table: torch.Tensor, num_layers: int) -> torch.Tensor:
    """The mean of a step function over equal pieces, by looking it up at very many places."""
    pieces = 840  # every N below divides it
    values = table.repeat_interleave(pieces // len(table), 0)
    return values.reshape(num_layers, pieces // num_layers, -1).mean(1)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 7, 8, 10, 12])
def test_a_segments_mean_is_the_mean_over_that_piece_of_depth(num_layers, generator):
    table = torch.randn(L, 6, generator=generator)
    torch.testing.assert_close(segment_mean(table, num_layers), naive_segment_mean(table, num_layers))


@pytest.mark.parametrize("start", ["segment", "aligned", "linear"])
def test_a_target_as_deep_as_the_learngene_starts_as_the_learngene(start, generator):
    table, bias = torch.randn(L, 6, generator=generator), torch.randn(L, 3, generator=generator)
    for matrix in ("qkv", "o", "out", "adaln"):
        sigma, biases = INITIALS[start].layers(matrix, table, bias, L, generator)
        torch.testing.assert_close(sigma, table)
        torch.testing.assert_close(biases, bias)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 6, 7, 8, 10, 12, 16])
def test_the_steps_of_a_segment_start_add_up_to_the_learngenes_own(num_layers, generator):
    table, bias = torch.randn(L, 6, generator=generator), torch.randn(L, 3, generator=generator)
    for matrix in ("o", "out"):
        sigma, biases = INITIALS["segment"].layers(matrix, table, bias, num_layers, generator)
        torch.testing.assert_close(sigma.sum(0), table.sum(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(biases.sum(0), bias.sum(0), atol=1e-5, rtol=1e-5)


def test_aligned_layers_are_layers_of_the_learngene_ends_on_ends(generator):
    assert nearest_layers(8, 4).tolist() == [0, 2, 5, 7]
    assert nearest_layers(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    table = torch.randn(L, 6, generator=generator)
    sigma, _ = INITIALS["aligned"].layers("qkv", table, table, 4, generator)
    assert torch.equal(sigma, table[[0, 2, 5, 7]])
    assert segment_share(4, 8).tolist() == [0.5] * 8  # each layer twice, each time half a step
    assert float(segment_share(8, 4).square().sum()) == pytest.approx(8)  # every layer is stood for once


def test_on_a_learngene_that_changes_slowly_the_segment_start_is_nearest_to_its_outputs(generator):
    arch = tiny_arch(num_layers=L)
    ancestor = lively(FactoredDiT(arch, 32, generator), std=0.15)
    depth = torch.linspace(0, 1, L)
    with torch.no_grad():
        for matrix in ancestor.genes:
            ends = torch.randn(2, 32, generator=generator)
            for layer, t in enumerate(depth):
                ancestor.sigma(matrix, layer).copy_(0.3 * ((1 - t) * ends[0] + t * ends[1]))
                ancestor.get_parameter(f"blocks.{layer}.{matrix}.bias").zero_()
    learngene = Artifact("here", "learngene", {"name": "fine"}, arch, ancestor.state_dict(), {}, "hash")  # type: ignore[arg-type]
    z, t, y = inputs(arch, batch=16)

    def error(start: str, num_layers: int) -> float:
        method = build(FineConfig(sigma=start))  # type: ignore[arg-type]
        model = method.descend(
            parent_of(learngene), arch.with_depth(num_layers), torch.Generator().manual_seed(0)
        ).model
        return float((model(z, t, y) - ancestor(z, t, y)).square().mean().detach())

    for num_layers in (2, 4, 6, 12):
        assert error("segment", num_layers) < 0.5 * min(error(start, num_layers) for start in ("linear", "random"))


def test_the_default_start_follows_how_the_factors_were_made():
    assert build(FineConfig()).sigma_initial({"initial": "joint"}) == "segment"
    assert build(FineConfig()).sigma_initial({"initial": "decompose"}) == "aligned"
    assert build(FineConfig(sigma="linear")).sigma_initial({"initial": "decompose"}) == "linear"
