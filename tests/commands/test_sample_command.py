"""`sample` as a user sees it: settings come with the model, processes share the work, a stopped command goes on."""

from __future__ import annotations

import json
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from fine_dist.sampling import drawing, renderer
from fine_dist.testing import run_distributed
from tests.commands.conftest import ARCH, FAST, command, data, refused
from tests.commands.test_export import latent_model, vae  # noqa: F401 - fixtures

STEPS = ["--sampler.steps", "4"]


def argv(model, run_dir, *more: str) -> list[str]:
    return ["sample", "--model", str(model), "--run-dir", str(run_dir), *STEPS, *more]


def latents(run_dir) -> np.ndarray:
    return np.load(run_dir / "samples.npy", allow_pickle=False)


def share(words: list[str]) -> int:
    """What each of several processes runs."""
    from fine_dist.engine import dist

    try:
        return command(words)
    finally:
        dist.leave()


@pytest.fixture(scope="module")
def short_chain(digit_shards, tmp_path_factory):
    """A model trained on a chain of 100 timesteps, without a null label."""
    run = tmp_path_factory.mktemp("short") / "train"
    own = ["--diffusion.num-timesteps", "100", "--diffusion.label-drop", "0"]
    assert command(["train", *ARCH, *FAST, *own, *data(digit_shards), "--run-dir", str(run)]) == 0
    return run


def test_two_processes_draw_what_one_does(trained, tmp_path):
    more = ["--classes", "balanced", "--count", "13", "--formats", "npy", "npz", "grid", "png", "--sampler.batch", "2"]
    assert command(argv(trained, tmp_path / "one", *more)) == 0
    assert run_distributed(share, 2, argv(trained, tmp_path / "two", *more)) == [0, 0]
    # matrix products of another batch size sum in another order: 1e-5 in fp32, and of a rounded pixel at most one level
    np.testing.assert_allclose(latents(tmp_path / "one"), latents(tmp_path / "two"), atol=1e-5, rtol=1e-5)
    pictures = [np.load(tmp_path / run / "samples.npz")["arr_0"] for run in ("one", "two")]
    assert pictures[0].shape == (13, 8, 8, 1) and pictures[0].dtype == np.uint8
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1
    assert np.load(tmp_path / "two" / "labels.npy").tolist() == [i % 10 for i in range(13)]
    assert sorted(p.name for p in (tmp_path / "two" / "images").iterdir())[12] == "000012-2.png"
    assert not (tmp_path / "two" / "store").exists()


def test_an_image_depends_on_the_seed_and_its_number_alone(trained, tmp_path):
    command(argv(trained, tmp_path / "few", "--classes", "balanced", "--count", "3"))
    command(argv(trained, tmp_path / "many", "--classes", "balanced", "--count", "9", "--sampler.batch", "4"))
    np.testing.assert_allclose(latents(tmp_path / "few"), latents(tmp_path / "many")[:3], atol=1e-5, rtol=1e-5)
    command(argv(trained, tmp_path / "other", "--classes", "balanced", "--count", "3", "--seed", "1"))
    assert np.abs(latents(tmp_path / "few") - latents(tmp_path / "other")).max() > 0.1


def test_a_stopped_command_draws_what_is_missing_and_no_more(trained, tmp_path, monkeypatch, capsys):
    words = argv(trained, tmp_path / "run", "--classes", "balanced", "--count", "10", "--sampler.batch", "2")
    whole, drawn = renderer.ImageRenderer.render, []

    def stops(self, *args):
        for batch in list(whole(self, *args))[:2]:
            drawn.extend(batch[0].indices.tolist())
            yield batch
        raise KeyboardInterrupt

    monkeypatch.setattr(renderer.ImageRenderer, "render", stops)
    assert command(words) == 130
    assert "the same command draws what is missing" in capsys.readouterr().err
    assert not (tmp_path / "run" / "samples.npy").exists()

    def counts(self, labels, numbers, *args):
        drawn.extend(numbers.tolist())
        return whole(self, labels, numbers, *args)

    monkeypatch.setattr(renderer.ImageRenderer, "render", counts)
    assert command(words) == 0
    assert drawn == list(range(10))
    monkeypatch.undo()
    command(argv(trained, tmp_path / "whole", "--classes", "balanced", "--count", "10", "--sampler.batch", "2"))
    assert np.array_equal(latents(tmp_path / "run"), latents(tmp_path / "whole"))
    assert command(words) == 0 and "drawn before" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(trained, tmp_path, capsys):
    """A limit on the size of files stands in for a full disk: the latents fit, what is made of them does not."""
    words = argv(trained, tmp_path / "run", "--classes", "balanced", "--count", "10")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (2000, 2600):  # 10 latents of 64 numbers are 2,560 bytes: the store is refused, then its .npy is
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            assert "too large" in refused(words, capsys)
            assert not (tmp_path / "run" / "samples.npy").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert command(words) == 0
    assert latents(tmp_path / "run").shape == (10, 1, 8, 8) and not list((tmp_path / "run").glob("*.draft*"))


def test_other_images_do_not_overwrite_those_that_are_there(trained, tmp_path, capsys):
    assert command(argv(trained, tmp_path, "--classes", "1", "--per-class", "2")) == 0
    before = latents(tmp_path)
    assert "seed" in refused(argv(trained, tmp_path, "--classes", "1", "--per-class", "2", "--seed", "3"), capsys)
    assert np.array_equal(before, latents(tmp_path))


def test_a_model_is_sampled_with_the_settings_it_was_trained_with(short_chain, tmp_path, capsys):
    more = ["--classes", "3", "--per-class", "2"]
    assert command(argv(short_chain, tmp_path / "own", *more)) == 0
    assert "note" not in capsys.readouterr().out
    own = json.loads((tmp_path / "own" / "samples.json").read_text())["protocol"]
    assert own["diffusion"]["num_timesteps"] == 100 and own["sampler"]["clip"] == 1.0
    assert np.abs(latents(tmp_path / "own")).max() <= 1 + 1e-4
    assert command(argv(short_chain, tmp_path / "said", *more, "--diffusion.num-timesteps", "1000")) == 0
    out = capsys.readouterr().out
    assert f"diffusion.num_timesteps 1000 is used; {short_chain} was trained with 100" in out
    assert np.abs(latents(tmp_path / "own") - latents(tmp_path / "said")).max() > 1e-3
    assert command(argv(short_chain, tmp_path / "off", *more, "--sampler.clip", "off")) == 0
    assert "sampler.clip off is used" in capsys.readouterr().out


def test_guidance_of_a_model_without_a_null_label_is_refused(short_chain, tmp_path, capsys):
    assert "label_drop 0" in refused(argv(short_chain, tmp_path / "r", "--sampler.guidance", "2"), capsys)


def test_averages_and_weights_draw_different_images(trained, tmp_path):
    for weights in ("ema", "raw"):
        command(argv(trained, tmp_path / weights, "--weights", weights, "--classes", "1"))
    assert not np.array_equal(latents(tmp_path / "ema"), latents(tmp_path / "raw"))


def test_latents_are_decoded_by_their_vae_or_called_latents(latent_model, vae, tmp_path, capsys):  # noqa: F811
    classes = ["--classes", "star", "0", "--per-class", "2"]
    assert "--vae" in refused(argv(latent_model, tmp_path / "no", *classes, "--formats", "npz"), capsys)
    assert command(argv(latent_model, tmp_path / "latents", *classes)) == 0
    more = ["--vae", str(vae), "--formats", "npy", "npz", "grid", "png"]
    assert command(argv(latent_model, tmp_path / "pictures", *classes, *more)) == 0
    with np.load(tmp_path / "pictures" / "samples.npz") as found:
        assert found.files == ["arr_0"] and found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (4, 8, 8, 3)
        first = found["arr_0"][0]
    assert np.array_equal(latents(tmp_path / "latents"), latents(tmp_path / "pictures"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / "images" / "000000-star.png")), first)
    assert np.load(tmp_path / "pictures" / "labels.npy").tolist() == [2, 2, 0, 0]
    grids = [Image.open(tmp_path / run / "samples.png") for run in ("latents", "pictures")]
    assert grids[0].size[0] > grids[1].size[0]  # its title says that nothing was decoded, and needs the room


def test_the_title_of_a_grid_says_that_latents_are_no_pictures(latent_model):  # noqa: F811
    config = drawing.SampleConfig(model=str(latent_model))
    made = renderer.make_renderer(config, str(latent_model), torch.device("cpu"))
    assert not made.pictures and "LATENTS, not decoded" in drawing.grid_title(made, config)


def test_models_beside_each_other_in_one_grid(trained, short_chain, tmp_path):
    words = ["sample", "--compare", str(trained), str(short_chain), "--classes", "1", "2", "--per-class", "2", *STEPS]
    assert command([*words, "--run-dir", str(tmp_path / "one")]) == 0
    assert run_distributed(share, 2, [*words, "--run-dir", str(tmp_path / "two")]) == [0, 0]
    one, two = (np.asarray(Image.open(tmp_path / run / "compare.png")).astype(int) for run in ("one", "two"))
    assert one.shape == two.shape and np.abs(one - two).max() <= 1
    assert one.shape[0] > 2 * 64 and one.shape[1] > 4 * 64


def test_models_of_other_classes_are_refused_before_anything_is_sampled(trained, tmp_path, capsys):
    small = load_artifact(trained / "model")
    arch = small.arch.model_copy(update={"num_classes": 6})
    state = DiT(arch).state_dict()
    save_artifact(tmp_path / "six", kind="model", method=small.method, arch=arch, tensors=state, extra={})
    words = ["sample", "--compare", str(trained), str(tmp_path / "six"), *STEPS, "--run-dir", str(tmp_path / "out")]
    assert "different numbers of classes: 6, 10" in refused(words, capsys)
    assert not (tmp_path / "out").exists()


def test_a_family_is_one_grid_with_a_row_for_each_target_and_nothing_else_of_its_folder(trained, tmp_path, capsys):
    family = tmp_path / "family"
    for name in ("L2", "L3"):  # folders as init leaves them; the targets' own tests make them by training
        shutil.copytree(trained / "model", family / name / "target")
    (family / "config.yaml").write_text("run_dir: x\n")
    (family / "events.out.tfevents.1.host").touch()
    assert drawing.family_members(family) == [family / "L2", family / "L3"]
    words = ["--classes", "1", "2", "--per-class", "1", *STEPS]
    assert command(["sample", "--model", str(family), *words, "--run-dir", str(tmp_path / "one")]) == 0
    assert "2 models, a row each" in capsys.readouterr().out
    everything = [str(path) for path in sorted(family.iterdir())]
    assert command(["sample", "--compare", *everything, *words, "--run-dir", str(tmp_path / "two")]) == 0
    one, two = (np.asarray(Image.open(tmp_path / run / "compare.png")) for run in ("one", "two"))
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("settings", "num_classes", "expected"),
    [({}, 10, 80), ({}, 1000, 80), ({"classes": ["all"]}, 1000, 8000), ({"count": 13}, 1000, 13)],
)
def test_ten_classes_are_drawn_and_all_only_when_asked(settings, num_classes, expected):
    config = drawing.SampleConfig(**settings)
    labels = drawing.labels_of(config, num_classes, ())
    assert len(labels) == expected
    if not settings and num_classes > 10:
        assert len(labels.unique()) == 10 and torch.equal(labels, drawing.labels_of(config, num_classes, ()))
        other = drawing.labels_of(config.model_copy(update={"seed": 1}), num_classes, ())
        assert not torch.equal(labels, other)


def test_the_work_is_estimated_before_it_is_begun(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(renderer, "LONG_FLOPS", 0.0)
    assert command(argv(trained, tmp_path / "r", "--classes", "1", "--per-class", "2")) == 0
    said = capsys.readouterr().out
    assert said.index("2 images of DiT") < said.index("images/s") and "about 0 s in this process alone" in said


def test_the_arithmetic_is_part_of_the_protocol(trained, tmp_path):
    protocols = []
    for precision in ("fp32", "bf16"):
        more = ["--classes", "1", "--sampler.precision", precision]
        assert command(argv(trained, tmp_path / precision, *more)) == 0
        protocols.append(json.loads((tmp_path / precision / "samples.json").read_text())["protocol"])
    assert [p["sampler"]["precision"] for p in protocols] == ["fp32", "bf16"]
    assert protocols[0]["sampler"]["scheduler"] == "ddim"  # what auto stands for
    assert not np.array_equal(latents(tmp_path / "fp32"), latents(tmp_path / "bf16"))
    np.testing.assert_allclose(latents(tmp_path / "fp32"), latents(tmp_path / "bf16"), atol=0.2)


def test_a_damaged_record_of_samples_is_one_line(trained, tmp_path, capsys):
    words = argv(trained, tmp_path, "--classes", "1", "--per-class", "1")
    assert command(words) == 0
    for content in ("[1]", "{}", '{"protocol": 3, "formats": []}', "{"):
        (tmp_path / "samples.json").write_text(content)
        assert "is damaged" in refused(words, capsys)


def test_a_target_whose_learngene_has_moved_is_found_by_its_flag(digit_shards, tmp_path, capsys):
    where = [*data(digit_shards), "--run-dir"]
    assert command(["condense", *ARCH, *FAST, *where, str(tmp_path / "c"), "--method.rank", "4"]) == 0
    init = ["init", "--parent", str(tmp_path / "c"), *where, str(tmp_path / "i"), "--depths", "2", "--steps", "2"]
    assert command([*init, "--batch", "16", "--engine.device", "cpu"]) == 0
    shutil.move(tmp_path / "c", tmp_path / "elsewhere")
    target = next((tmp_path / "i").glob("L2*"))
    capsys.readouterr()
    assert "--learngene" in refused(argv(target, tmp_path / "s", "--classes", "1"), capsys)
    assert command(argv(target, tmp_path / "s", "--classes", "1", "--learngene", str(tmp_path / "elsewhere"))) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--classes", "11"], "0..10"),
        (["--classes", "-1"], "0..10"),
        (["--classes=--5"], "no class is called '--5'"),
        (["--classes", "circle"], "balanced"),
        (["--sampler.steps", "3"], "divisor of 1000"),
        (["--vae", "nowhere"], "latents; leave it out"),
        (["--formats", "gif"], "npz"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(more, words, trained, tmp_path, capsys):
    assert words in refused(argv(trained, tmp_path / "r", *more), capsys)
