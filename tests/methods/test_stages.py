"""The stages carry a method from an ancestor to targets: condense in the method's own depth, then a family."""

from __future__ import annotations

import pytest

from fine_dist import init
from fine_dist.artifacts.load import load_model
from fine_dist.core.config import validate
from fine_dist.core.errors import ArtifactError
from fine_dist.family.config import InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.methods.kind.gates import GatedDiT
from fine_dist.model.artifact import load_artifact
from fine_dist.stages.condense import run as condense
from fine_dist.stages.settings import CondenseConfig
from tests.conftest import tiny_arch
from tests.methods.making import TINY, artifact_for, saved, tiny, trained

ENGINE = {"threads": 1, "device": "cpu"}


def settings(name, run_dir, digit_shards, **more):
    data = {"shards": str(digit_shards / "train"), "held_out": str(digit_shards / "held_out")}
    common = {"run_dir": str(run_dir), "steps": 2, "batch": 8, "engine": ENGINE}
    if name == "condense":
        return validate(CondenseConfig, {**common, "arch": tiny_arch().model_dump(), "data": data, **more})
    return validate(InitConfig, {**common, "domains": {"digits": {"data": data, **more.pop("domain", {})}}, **more})


def test_tleg_is_distilled_from_an_ancestor_of_another_depth_and_width_and_gives_ready_targets(tmp_path, digit_shards):
    saved(tmp_path / "ancestor", "model", tiny("scratch"), trained(tiny_arch(num_layers=5, hidden_size=48)))
    method = {"name": "tleg", **TINY["tleg"]}
    run_dir = tmp_path / "condense"
    condense(settings("condense", run_dir, digit_shards, method=method, ancestor=str(tmp_path / "ancestor")))
    learngene = load_artifact(run_dir / "learngene")
    assert learngene.arch == tiny_arch(num_layers=3) and learngene.extra["ancestor"]["hash"]
    init.run(settings("init", tmp_path / "init", digit_shards, parent=str(run_dir), depths=[2]))
    model, about = load_model(tmp_path / "init" / "L2-digits-s0-lr0.01")
    assert about["kind"] == "model" and model.arch == tiny_arch(num_layers=2)  # stage 3 takes it as it is


def test_kind_is_transferred_at_its_own_depth_alone_and_comes_back_with_its_gate(tmp_path, digit_shards):
    parent = str(artifact_for("kind").folder)
    config = settings("init", tmp_path, digit_shards, parent=parent, depths=[4], domain={"labels": "new"})
    init.run(config)
    model, about = load_model(tmp_path / "L4-digits-s0-lr0.01")
    assert isinstance(model, GatedDiT) and about["kind"] == "target"
    assert set(about["inherited"]) & {"blocks.0.qkv.U", "final.linear.weight"}  # frozen: kept by the parent's hash
    with pytest.raises(ArtifactError, match="num_layers is 4 in the parent, 2 in the target; with method kind"):
        Family(config.model_copy(update={"depths": (4, 2), "run_dir": str(tmp_path / "other")})).check()
