"""Heur-LG and Auto-LG: which blocks of an ancestor a target keeps, and where."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ArtifactError
from fine_dist.methods import check
from tests.conftest import lively, tiny_arch
from tests.methods.making import artifact_for, condensed, parent_for, saved, tiny


def origins(model, ancestor):
    """For each of a model's blocks, the ancestor's block that it is, or none."""
    found = []
    for block in model.blocks:
        same = [
            layer
            for layer, other in enumerate(ancestor.blocks)
            if all(torch.equal(p, q) for p, q in zip(block.parameters(), other.parameters()))
        ]
        found.append(same[0] if same else None)
    return found


@pytest.mark.parametrize(
    ("name", "settings", "depth", "expected"),
    [
        ("heur_lg", {}, 6, [None, None, None, 1, 2, 3]),
        ("heur_lg", {}, 2, [2, 3]),
        ("heur_lg", {"keep": 1}, 3, [None, None, 3]),
        ("heur_lg", {"keep": 9}, 5, [None, 0, 1, 2, 3]),
        ("auto_lg", {}, 6, [0, 1, 2, 3, None, None]),
        ("auto_lg", {"keep": 2}, 4, [0, 1, None, None]),
        ("auto_lg", {}, 2, [0, 1]),
    ],
)
def test_whole_blocks_are_kept_at_their_end_and_the_rest_are_scratch(name, settings, depth, expected, generator):
    parent = parent_for(name)
    descent = tiny(name, **settings).descend(parent, tiny_arch(num_layers=depth), generator)
    assert origins(descent.model, parent.module) == expected
    assert descent.trains == "nothing"
    assert torch.equal(descent.model.time.out.weight, parent.module.time.out.weight)


def test_the_papers_numbers_are_three_and_six():
    assert tiny("heur_lg").config.keep == 3 and tiny("auto_lg").config.keep == 6


def test_a_learngene_or_a_model_that_is_no_ordinary_one_is_refused(tmp_path):
    with pytest.raises(
        ArtifactError, match=r"is a learngene, and method heur_lg takes: model; methods that could: .*fine"
    ):
        check(tiny("heur_lg"), artifact_for("fine"), tiny_arch())
    gated = saved(tmp_path / "gated", "model", tiny("kind"), lively(condensed(tiny("kind"))[1]))
    with pytest.raises(ArtifactError, match="is a model of method kind and not an ordinary DiT"):
        check(tiny("heur_lg"), gated, tiny_arch())
