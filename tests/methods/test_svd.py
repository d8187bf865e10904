"""Per-layer SVD: the best approximation of its rank, and a budget equal to that of shared factors."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.methods import build, check, from_manifest
from fine_dist.methods.settings import SvdConfig
from fine_dist.methods.svd import shared_numbers, top_components
from fine_dist.model.arch import arch
from fine_dist.model.factors import FactoredDiT
from fine_dist.model.roles import count_by_role
from tests.conftest import tiny_arch
from tests.methods.making import artifact_for, parent_for, tiny


def test_the_error_that_is_left_is_the_singular_values_that_were_cut(generator):
    weight = torch.randn(12, 8, generator=generator)
    values = torch.linalg.svdvals(weight)
    for rank in (1, 3, 8):
        cut = top_components(weight, rank)
        assert int(torch.linalg.matrix_rank(cut)) == rank
        assert float((weight - cut).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-5)


def test_a_target_takes_the_nearest_layers_in_depth_cut_to_the_rank(generator):
    parent = parent_for("svd")
    model = tiny("svd", rank=5).descend(parent, tiny_arch(num_layers=2), generator).model
    for layer, source in ((0, 0), (1, 3)):
        ours, theirs = (m.blocks[i].get_submodule("in") for m, i in ((model, layer), (parent.module, source)))
        torch.testing.assert_close(ours.weight, top_components(theirs.weight.detach(), 5))
        assert torch.equal(ours.bias, theirs.bias)


def test_with_all_components_the_ancestor_comes_back(generator):
    parent = parent_for("svd")
    model = tiny("svd", rank=32).descend(parent, tiny_arch(), generator).model
    for (name, p), q in zip(model.named_parameters(), parent.module.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["DiT-B/2", "DiT-L/2"])
def test_the_default_rank_is_what_fits_into_the_numbers_of_shared_factors(name):
    a = arch(name)
    with torch.device("meta"):
        counts = count_by_role(FactoredDiT(a, a.hidden_size))
    budget = counts["gene"] + counts["scaler"]
    assert shared_numbers(a) == budget
    method = build(SvdConfig())
    rank = method.rank(a)
    assert method.numbers(a, rank) <= budget < method.numbers(a, rank + 1)
    assert rank == a.hidden_size // a.num_layers  # 64 of 768, 42 of 1024


def test_a_budget_without_room_or_beside_a_rank_is_refused():
    with pytest.raises(ArtifactError, match="budget 100 is too small: one component of every matrix of 4 layers takes"):
        check(tiny("svd", budget=100), artifact_for("svd"), tiny_arch())
    with pytest.raises(ConfigError, match="both set the number of components"):
        from_manifest({"name": "svd", "rank": 3, "budget": 10000})
