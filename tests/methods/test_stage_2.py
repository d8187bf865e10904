"""Methods that train by themselves in stage 2, through the family's own run: new labels, samples, refusals."""

from __future__ import annotations

import pytest
import torch

from fine_dist.artifacts.load import load_model
from fine_dist.core.errors import ArtifactError
from fine_dist.data.settings import DataConfig
from fine_dist.engine.settings import LoopConfig
from fine_dist.family.config import DomainConfig, InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.family.train_family import run_family
from fine_dist.methods import METHODS
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from fine_dist.stages.settings import TrainConfig
from fine_dist.stages.train import TrainStage
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import method_of

CLASSES = 4
SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "num_classes": CLASSES}


def family(name, folder, shards, parent, labels="new", **fields):
    data = DataConfig(shards=str(shards / "train"), held_out=str(shards / "held_out"))
    loop = LoopConfig(device="cpu", threads=1, checkpoint_every=100, log_every=1, eval_every=100)
    return Family(
        InitConfig(
            run_dir=str(folder), parent=str(parent), method=METHODS[name].Config(name=name), steps=3, batch=16,
            domains={"digits": DomainConfig(data=data, labels=labels)}, engine=loop,
            **{"depths": (2,), **fields},
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    model = lively(DiT(tiny_arch(**SMALL)))
    save_artifact(
        folder / "model", kind="model", method={"name": "scratch"}, arch=model.arch, tensors=model.state_dict()
    )
    method = method_of("snnet")
    arch = tiny_arch(num_layers=2, num_classes=CLASSES)
    pool = lively(method.condense(arch, None, torch.Generator().manual_seed(0)).module)
    settings = method.config.model_dump(mode="json")
    save_artifact(folder / "pool", kind="learngene", method=settings, arch=arch, tensors=pool.state_dict())
    return folder


@pytest.mark.parametrize(
    ("name", "parent", "fields"),
    [
        ("difffit", "model", {}),
        ("vera", "model", {}),
        ("ligo", "model", {"depths": (3,)}),
        ("snnet", "pool", {}),
    ],
)
def test_a_target_of_new_classes_trains_and_is_read_again(name, parent, fields, digit_shards, parents, tmp_path):
    made = family(name, tmp_path / "i", digit_shards, parents / parent, **fields)
    run_family(made, inside=False)
    [member] = made.members
    model, about = load_model(member.folder)
    shape = model.arch
    assert (shape.num_classes, shape.num_layers) == (10, fields.get("depths", (2,))[0])
    assert model(*inputs(shape)).isfinite().all() and about["init"]["steps"] == 3
    theirs = load_artifact(parents / parent).tensors
    stored = load_artifact(member.folder / "target").tensors
    if name == "difffit":  # what trains is all that is stored: no weight of a block is
        assert not any(key.startswith("blocks.") and key.endswith(".weight") for key in stored)
        assert torch.equal(model.blocks[0].get_submodule("in").weight, theirs["blocks.0.in.weight"])
        assert model.label.weight.shape == (11, 16) and not torch.equal(model.label.weight[0], model.label.weight[1])
    if name == "snnet":
        assert all(anchor.label.weight.shape[0] == 11 for anchor in model.anchors)
        # stage 3 would train the pool, and counts it
        counted = TrainStage(TrainConfig(parent=str(member.folder))).blueprint()
        assert counted.method.cost(counted.model).trained == sum(p.numel() for p in model.parameters())


def test_least_squares_look_at_the_targets_own_data(digit_shards, parents, tmp_path):
    from fine_dist.data.stream import read_all

    made = family("snnet", tmp_path / "i", digit_shards, parents / "pool")
    [member] = made.members
    latents, labels = made.parent_with_samples(member).samples
    expected = read_all(str(digit_shards / "train"), 100)
    assert torch.equal(latents, expected[0]) and labels.tolist() == [CLASSES] * 100  # the parent's null label
    kept = family("snnet", tmp_path / "i", digit_shards, parents / "pool", labels="keep")
    assert torch.equal(kept.parent_with_samples(kept.members[0]).samples[1], expected[1])
    assert made.parent.samples is None


@pytest.mark.parametrize(
    ("name", "depths", "words"),
    [
        ("weight_selection", (1, 9), "num_layers is 2 in the parent, 9 in the target"),
        ("ligo", (2, 1), "num_layers is 2 in the parent, 1 in the target"),
        ("lora", (2, 3), "num_layers is 2 in the parent, 3 in the target"),
    ],
)
def test_a_family_with_one_impossible_depth_is_refused_before_anything_trains(
    name, depths, words, digit_shards, parents, tmp_path
):
    made = family(name, tmp_path / "i", digit_shards, parents / "model", depths=depths)
    with pytest.raises(ArtifactError, match=words):
        run_family(made, inside=False)
    assert not list((tmp_path / "i").glob("L*"))
