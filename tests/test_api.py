"""The library from Python: models, latents and results in memory, without a run directory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import fine_dist as fd
from fine_dist.core.errors import ConfigError
from fine_dist.data.small_images import digits
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT

ARCH = Arch(hidden_size=32, num_layers=3, num_heads=2, patch_size=2, in_channels=1, input_size=8, num_classes=10)
FAST = {"batch": 16, "engine": {"device": "cpu", "eval_every": 1000, "threads": 1}}


@pytest.fixture(scope="module")
def pairs():
    """(latent, label) of 160 digits, as a torch Dataset would give them."""
    images, labels = digits("train")
    return [(torch.from_numpy(image), int(label)) for image, label in zip(images[:160], labels[:160])]


@pytest.fixture(scope="module")
def ancestor():
    """A DiT in memory whose weights are all random, also those that DiT starts at zero."""
    torch.manual_seed(0)
    model = DiT(ARCH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    return model


@pytest.fixture(scope="module")
def learngene(ancestor, pairs):
    return fd.condense(ancestor, pairs, steps=4, **FAST)


def test_a_module_in_memory_is_a_model(ancestor):
    model = fd.load(ancestor)
    z, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10, 500]), torch.tensor([3, 7])
    assert model.arch == ARCH and fd.load(model) is model
    torch.testing.assert_close(model(z, t, y), ancestor.eval()(z, t, y))
    with pytest.raises(ConfigError, match="a Linear is neither a fine_dist DiT nor a model of diffusers"):
        fd.load(torch.nn.Linear(2, 2))


def test_a_learngene_becomes_a_model_of_another_depth_that_draws(learngene, pairs, tmp_path):
    assert learngene.about["kind"] == "learngene" and learngene.about["method"]["name"] == "fine"
    model = fd.initialise(learngene, depth=5, data=pairs, steps=3, **FAST)
    assert model.arch.num_layers == 5
    images = model.sample([3, "7"], per_class=2, seed=1, sampler={"steps": 4})
    assert len(images) == 4 and all(isinstance(image, Image.Image) and image.size == (8, 8) for image in images)
    again = model.sample([7], per_class=1, seed=1, sampler={"steps": 4})
    assert len(again) == 1
    kept = model.save(tmp_path / "kept")
    loaded = fd.load(kept)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, loaded.module.state_dict()[name]), name


def test_a_target_without_data_is_the_one_before_training_and_training_moves_it(learngene, pairs):
    before = fd.initialise(learngene, depth=2)
    same = fd.initialise(learngene, depth=2)
    after = fd.initialise(learngene, depth=2, data=pairs, steps=3, **FAST)
    weight = "blocks.0.attn.qkv.weight" if "blocks.0.attn.qkv.weight" in before.module.state_dict() else None
    name = weight or next(n for n, p in before.module.state_dict().items() if "blocks" in n and p.ndim == 2)
    assert torch.equal(before.module.state_dict()[name], same.module.state_dict()[name])
    assert not torch.equal(before.module.state_dict()[name], after.module.state_dict()[name])


def test_a_number_is_that_of_the_command(learngene, pairs, tmp_path, capsys):
    from fine_dist import evaluate as command
    from fine_dist.data.shards import write_shards

    found = fd.evaluate(learngene, held_out=pairs[:64])
    write_shards(
        tmp_path / "shards",
        np.stack([latent.numpy() for latent, _ in pairs[:64]]),
        np.array([label for _, label in pairs[:64]]),
        num_classes=10,
        dtype="float32",
        shard_samples=4,
    )
    words = ["--models", str(learngene.path), "--data.held-out", str(tmp_path / "shards"), "--launcher", "here"]
    assert command.main([*words, "--run-dir", str(tmp_path / "run")]) == 0
    import json

    row = json.loads((tmp_path / "run" / "evaluate.json").read_text())["rows"][0]
    assert found["held_out_loss"] == pytest.approx(row["held_out_loss"], rel=1e-6)  # the same questions, summed alike


def test_functions_and_command_modules_share_their_names(learngene, pairs):
    import fine_dist.condense  # sets the attribute `condense` of the package to the module

    assert callable(fine_dist.condense) and callable(fine_dist.condense.run)
    assert fd.condense(None, pairs, arch=ARCH.model_dump(), steps=1, **FAST).arch.num_layers == 3


def test_what_is_wrong_is_named_with_its_legal_values(learngene, pairs):
    with pytest.raises(ConfigError, match=r"optim\.lrr: unknown key"):
        fd.condense(None, pairs, arch=ARCH.model_dump(), steps=1, optim={"lrr": 1})
    with pytest.raises(ConfigError, match="there is no class 11; legal: 0 to 9"):
        learngene.sample([11])
