"""Artifacts of earlier versions, and targets that need nothing of the code that made them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fine_dist.artifacts.targets import changed_tensors, descend, load_target, save_target
from fine_dist.core.errors import ArtifactError
from fine_dist.methods import build, parent_of
from fine_dist.methods.fine.config import FineConfig
from fine_dist.methods.fine.method import Fine
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.factors import FactoredDiT
from tests.conftest import inputs, lively, tiny_arch


@pytest.fixture
def made(tmp_path):
    model = lively(FactoredDiT(tiny_arch(), 16), std=0.15)
    method = FineConfig(rank=16).model_dump()
    save_artifact(tmp_path / "learngene", kind="learngene", method=method, arch=model.arch, tensors=model.state_dict())
    parent = parent_of(load_artifact(tmp_path / "learngene"))
    made = descend(build(FineConfig(rank=16)), parent, tiny_arch(num_layers=3), 0).model
    own, names = changed_tensors(made, parent), list(made.state_dict())
    save_target(tmp_path / "target", method=method, parent=parent, arch=made.arch, tensors=own, names=names, facts={})
    return made


def test_a_target_holds_all_that_is_not_its_parents_and_nothing_that_is(made, tmp_path):
    artifact = load_artifact(tmp_path / "target")
    assert {name.rsplit(".", 1)[1] for name in artifact.tensors} == {"sigma", "bias"}
    assert set(artifact.extra["inherited"]) | artifact.tensors.keys() == made.state_dict().keys()
    dense, _ = load_target(tmp_path / "target")
    batch = inputs(made.arch)
    torch.testing.assert_close(dense(*batch), made(*batch), atol=1e-5, rtol=1e-5)


def test_a_target_is_the_same_whatever_later_code_would_make_of_its_beginning(made, tmp_path, monkeypatch):
    before = load_target(tmp_path / "target")[0].state_dict()

    def another(*_):
        raise AssertionError("a target was made again from its parent")

    monkeypatch.setattr(Fine, "descend", another)
    after = load_target(tmp_path / "target")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_moved_parent_is_found_by_its_hash_or_asked_for(made, tmp_path):
    shutil.move(tmp_path / "learngene", tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="say where it lies now with --learngene FOLDER"):
        load_target(tmp_path / "target")
    load_target(tmp_path / "target", learngene=tmp_path / "elsewhere")
    other = lively(FactoredDiT(tiny_arch(), 16), seed=9)
    method = FineConfig(rank=16).model_dump()
    save_artifact(tmp_path / "another", kind="learngene", method=method, arch=other.arch, tensors=other.state_dict())
    with pytest.raises(ArtifactError, match="is another one"):
        load_target(tmp_path / "target", learngene=tmp_path / "another")


def test_the_place_of_a_moved_parent_is_read_as_a_shell_reads_it(made, tmp_path, monkeypatch):
    shutil.move(tmp_path / "learngene", tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_target(tmp_path / "target", learngene="~/elsewhere")[0].arch.num_layers == 3
    monkeypatch.setenv("WHERE", "elsewhere")
    assert load_target(tmp_path / "target", learngene="$HOME/$WHERE")[0].arch.num_layers == 3


def test_damaged_hints_for_a_foreign_parent_are_one_line(made, tmp_path):
    shutil.rmtree(tmp_path / "learngene")
    manifest = tmp_path / "target" / "manifest.json"
    content = json.loads(manifest.read_text())
    for damaged in ({"num_heads": "many"}, ["num_heads"], 3):
        content["extra"]["parent"]["hints"] = damaged
        manifest.write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match=r"parent\.hints in its manifest\.json is damaged; copy it again$"):
            load_target(tmp_path / "target")
