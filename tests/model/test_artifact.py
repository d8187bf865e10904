"""Learngenes on disk: what is written comes back, and what was damaged is refused in words."""

from __future__ import annotations

import json

import pytest
import torch

from fine_dist.errors import ArtifactError
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.factors import FactoredDiT
from tests.conftest import lively, tiny_arch


@pytest.fixture
def saved(tmp_path):
    model = lively(FactoredDiT(tiny_arch(), 16))
    save_artifact(
        tmp_path / "learngene",
        kind="learngene",
        method={"name": "fine", "rank": 16},
        arch=model.arch,
        tensors=model.state_dict(),
        extra={"ancestor": "none"},
    )
    return tmp_path / "learngene", model


def test_every_tensor_and_setting_comes_back(saved):
    folder, model = saved
    artifact = load_artifact(folder, "learngene")
    assert artifact.arch == model.arch and artifact.method["rank"] == 16 and artifact.extra == {"ancestor": "none"}
    assert all(torch.equal(artifact.tensors[k], v) for k, v in model.state_dict().items())
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "tensors.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["learngene"]  # nothing temporary is left


def test_writing_again_replaces_the_folder_whole(saved):
    folder, model = saved
    first = load_artifact(folder).hash
    save_artifact(folder, kind="model", method={"name": "he"}, arch=model.arch, tensors={"a": torch.ones(2)})
    again = load_artifact(folder)
    assert again.kind == "model" and again.hash != first and list(again.tensors) == ["a"]


def damage_tensors(folder):
    data = bytearray((folder / "tensors.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "tensors.safetensors").write_bytes(bytes(data))


def truncate_tensors(folder):
    data = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(data[: len(data) // 2])


def other_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_tensors, "edited or half copied"),
        (truncate_tensors, "edited or half copied"),
        (lambda f: (f / "tensors.safetensors").unlink(), "no tensors.safetensors"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (other_format, "format 99"),
    ],
)
def test_a_damaged_folder_is_refused_and_named(saved, damage, words):
    folder, _ = saved
    damage(folder)
    with pytest.raises(ArtifactError, match=words) as caught:
        load_artifact(folder)
    assert str(folder) in str(caught.value)


def test_a_model_where_a_learngene_is_needed_is_refused(saved):
    folder, _ = saved
    with pytest.raises(ArtifactError, match="is a learngene, and a model is needed"):
        load_artifact(folder, "model")
