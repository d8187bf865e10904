"""Every registered method keeps the contract of `fine_dist.testing`, and what does not fit a method is refused."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.methods import METHODS, build, check, from_manifest
from fine_dist.methods.fine.config import FineConfig
from tests.conftest import tiny_arch
from tests.methods.making import CASES, artifact_for

globals().update({case.__name__: case for case in CASES.values()})  # pytest finds one class a method


def test_every_method_has_a_case():
    assert set(CASES) == set(METHODS) and all(f"Test_{name}" in globals() for name in METHODS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 32 in the parent, 64 in the target"),
        ({"num_classes": 12}, "num_classes is 10 in the parent, 12"),
        ({"in_channels": 4}, "in_channels"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(fields, words):
    with pytest.raises(ArtifactError, match=words):
        check(build(FineConfig()), artifact_for("fine"), tiny_arch(**fields))


def test_a_missing_or_wrong_parent_or_method_is_said_with_the_methods_that_could():
    learngene = artifact_for("fine")
    with pytest.raises(ArtifactError, match=r"starts from a learngene.*methods that could: .*scratch"):
        check(build(FineConfig()), None, tiny_arch())
    with pytest.raises(
        ArtifactError, match=r"is a learngene, and method scratch takes: none; methods that could: .*fine"
    ):
        check(build(METHODS["scratch"].Config(name="scratch")), learngene, tiny_arch())
    with pytest.raises(ArtifactError, match="did you mean 'fine'"):
        from_manifest({"name": "fin"})
    with pytest.raises(ConfigError, match="rank"):
        from_manifest({"name": "fine", "rank": 0})
    with pytest.raises(ConfigError, match="scratch has no stage 1"):
        build(METHODS["scratch"].Config(name="scratch")).condense(tiny_arch(), None, torch.Generator())
