"""Images, latents and models whose height and width differ, from a folder of pictures to every stage and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fine_dist.api import load
from fine_dist.artifacts.dit_pt import read_dit, write_dit
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.data.image_decoding import center_crop
from fine_dist.data.stream import read_all
from fine_dist.model.dit import DiT
from fine_dist.model.flops import forward_macs
from tests.commands.conftest import FAST, command, refused
from tests.conftest import inputs, tiny_arch
from tests.data.picturing import picture

SHAPE = ["--arch.hidden-size", "32", "--arch.num-layers", "3", "--arch.num-heads", "4", "--arch.no-learn-sigma"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures of 12 x 20 pixels of two classes, as shards of pixels with a held-out part."""
    root = tmp_path_factory.mktemp("oblong")
    for label, name in enumerate(("cat", "dog")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(20):
            picture(50 * label + i).save(root / "images" / name / f"{i}.png")
    words = ["--source", str(root / "images"), "--held-out-fraction", "0.25", "--image-size", "12", "20"]
    assert command(["encode", *words, "--out", str(root / "shards"), "--dtype", "float32"]) == 0
    return root / "shards"


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """A run of `train` whose model takes the shape of its latents from the shards."""
    run = tmp_path_factory.mktemp("oblong") / "train"
    where = ["--data.shards", str(shards / "train"), "--data.held-out", str(shards / "held_out")]
    assert command(["train", *SHAPE, *FAST, *where, "--run-dir", str(run), "--engine.preview-every", "2"]) == 0
    return run


def test_a_crop_keeps_the_middle_at_the_scale_at_which_it_just_fits():
    ramp = np.zeros((40, 100, 3), np.uint8)
    ramp[..., 0] = np.arange(100)[None, :]
    found = center_crop(Image.fromarray(ramp), (20, 30))
    assert found.shape == (3, 20, 30)
    # halved once, 20 x 50 is left: of its columns, which are pairs of the original's, the middle 30
    np.testing.assert_allclose(found[0, 10], np.arange(20, 80, 2) + 0.5, atol=1)
    square = center_crop(picture(0), 32)
    assert np.array_equal(square, center_crop(picture(0), (32, 32)))


def test_shards_hold_the_pictures_own_shape(shards):
    latents, _ = read_all(str(shards / "train"))
    assert latents.shape == (30, 3, 12, 20)


def test_a_model_trains_resumes_samples_and_is_measured(trained, shards, tmp_path, capsys):
    where = ["--data.shards", str(shards / "train"), "--data.held-out", str(shards / "held_out")]
    assert load_model(trained)[0].arch.latent_shape == (3, 12, 20)
    more = [*FAST, "--steps", "6", *where, "--run-dir", str(trained), "--engine.preview-every", "2"]
    assert command(["train", *SHAPE, *more]) == 0  # the identity on disk is that of the settings
    draw = ["sample", "--model", str(trained), "--classes", "0", "1", "--per-class", "2", "--sampler.steps", "2"]
    assert command([*draw, "--formats", "npy", "grid", "npz", "--run-dir", str(tmp_path / "s")]) == 0
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].shape == (4, 12, 20, 3)
    images = load(trained).sample([0, 1], sampler={"steps": 2})
    assert [image.size for image in images] == [(20, 12), (20, 12)]
    evaluate = ["evaluate", "--models", str(trained), *where, "--run-dir", str(tmp_path / "e")]
    assert command([*evaluate, "--engine.device", "cpu"]) == 0
    [row] = json.loads((tmp_path / "e" / "evaluate.json").read_text())["rows"]
    done = json.loads((trained / "DONE.json").read_text())
    assert row["held_out_loss"] == pytest.approx(done["losses"]["held_out_loss"], rel=1e-4)
    assert "Traceback" not in capsys.readouterr().err


def test_a_learngene_and_its_packed_targets_keep_the_shape(trained, shards, tmp_path):
    where = ["--data.shards", str(shards / "train"), "--data.held-out", str(shards / "held_out")]
    run = tmp_path / "c"
    argv = ["condense", "--ancestor", str(trained), *FAST, *where, "--run-dir", str(run), "--method.rank", "8"]
    assert command([*argv, "--method.initial", "decompose"]) == 0
    init = ["init", "--parent", str(run), *where, "--run-dir", str(tmp_path / "i"), "--depths", "2", "3"]
    assert command([*init, "--steps", "2", "--batch", "8", "--engine.device", "cpu"]) == 0
    for target in (tmp_path / "i").glob("L*"):
        model = load_model(target)[0]
        assert model(*inputs(model.arch)).shape == (3, 3, 12, 20)


def test_a_target_may_have_another_height_and_width_than_its_parent(trained, shards, tmp_path):
    words = ["--parent", str(trained), "--method.name", "difffit", "--depths", "3", "--steps", "1", "--batch", "4"]
    where = ["--data.shards", str(tmp_path / "large" / "train"), "--run-dir", str(tmp_path / "i")]
    images = str(shards.parent / "images")
    assert command(["encode", "--source", images, "--image-size", "24", "20", "--out", str(tmp_path / "large")]) == 0
    shape = [*SHAPE, "--arch.in-channels", "3", "--arch.input-size", "24", "20", "--arch.num-classes", "2"]
    assert command(["init", *words, *where, *shape, "--engine.device", "cpu"]) == 0
    model = load_model(next((tmp_path / "i").glob("L3*")))[0]
    assert (model.arch.latent_shape, model.arch.position_grid) == ((3, 24, 20), (6, 10))
    old = load_model(trained)[0].pos.view(6, 10, -1)
    torch.testing.assert_close(model.pos.view(12, 10, -1)[::2], old)  # every second row is one that the parent knows


def test_dits_layout_holds_the_shape_and_diffusers_refuses_it_in_words(trained, tmp_path, capsys):
    argv = ["export", "--model", str(trained), "--to"]
    assert command([*argv, "dit", "--out", str(tmp_path / "x.pt")]) == 0
    before = load_model(trained)[0]
    after = read_dit(tmp_path / "x.pt", HintsConfig(num_heads=4))
    assert after.arch == before.arch
    assert all(torch.equal(after.state[name], tensor) for name, tensor in before.state_dict().items())
    assert command([*argv, "fine_dist", "--out", str(tmp_path / "ours")]) == 0
    assert load_model(tmp_path / "ours")[0].arch == before.arch
    said = refused([*argv, "diffusers", "--out", str(tmp_path / "d")], capsys)
    assert "latents are 12 x 20 (input_size), and diffusers' DiTTransformer2DModel has square ones only" in said
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("size", [(4, 16), (4, 6), (2, 14)])
def test_a_grid_is_read_from_the_position_table(size, tmp_path):
    arch = tiny_arch(input_size=size, learn_sigma=True)
    write_dit(tmp_path / "a.pt", arch, DiT(arch).state_dict())
    assert read_dit(tmp_path / "a.pt", HintsConfig(num_heads=4)).arch == arch


def test_costs_are_those_of_the_tokens():
    oblong, square = tiny_arch(input_size=(4, 16)), tiny_arch(input_size=8)
    assert forward_macs(oblong) == forward_macs(square) and oblong.count() == square.count()
    assert forward_macs(tiny_arch(input_size=(8, 16))) > 2 * forward_macs(square)


def test_latents_of_another_shape_than_the_models_are_one_line(trained, shards, digit_shards, tmp_path, capsys):
    argv = ["train", *SHAPE, *FAST, "--data.shards", str(shards / "train"), "--run-dir", str(tmp_path / "t")]
    said = refused([*argv, "--arch.input-size", "20", "12"], capsys)
    assert "latents are 3x12x20, but the model takes 3x20x12" in said
    assert "input_size" in refused([*argv, "--arch.input-size", "12", "20", "4"], capsys)
    assert "image_size: one whole number" in refused(["encode", "--image-size", "0", "--out", str(tmp_path)], capsys)


def test_positions_that_were_rescaled_along_both_sides_are_read_back(tmp_path):
    arch = tiny_arch(input_size=(8, 20), position_grid=(2, 9), learn_sigma=True)
    write_dit(tmp_path / "a.pt", arch, DiT(arch).state_dict())
    assert read_dit(tmp_path / "a.pt", HintsConfig(num_heads=4)).arch == arch
