"""A model goes out in three formats; in the library each was written for it is what it was, and it comes in again."""

from __future__ import annotations

import re
import resource
import signal

import pytest
import torch
from PIL import Image

from fine_dist.artifacts.diffusers_export import load_pipeline
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.errors import ArtifactError
from tests.commands.conftest import command, refused
from tests.conftest import inputs, lively, tiny_arch


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny random autoencoder of 4 latent channels."""
    from benchmarks.sample import tiny_vae

    folder = tmp_path_factory.mktemp("vae") / "vae"
    tiny_vae(folder, 4)
    return folder


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """A model of 4-channel latents as a folder of ours."""
    from fine_dist.model.artifact import save_artifact
    from fine_dist.model.dit import DiT

    model = lively(DiT(tiny_arch(in_channels=4, num_layers=2, num_classes=3)), std=0.05)
    folder = tmp_path_factory.mktemp("latents") / "model"
    extra = {
        "licence": "cc-by-nc-4.0",
        "class_names": ["circle", "square", "star"],
        "codec": {"name": "vae", "scaling_factor": 0.18215},
        "losses": {"held_out_loss": 0.5},
    }
    save_artifact(
        folder, kind="model", method={"name": "scratch"}, arch=model.arch, tensors=model.state_dict(), extra=extra
    )
    return folder


def test_a_pipeline_draws_pictures_in_diffusers_itself(latent_model, vae, tmp_path, capsys):
    out = tmp_path / "pipeline"
    argv = ["export", "--model", str(latent_model), "--to", "diffusers", "--vae", str(vae), "--out", str(out)]
    assert command(argv) == 0
    said = capsys.readouterr().out
    assert "DiTPipeline" in said and "outputs differ by at most" in said
    pipeline = load_pipeline(out)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 1, 2], num_inference_steps=2, guidance_scale=1.5, output_type="np").images
    assert images.shape[0] == 3 and images.shape[-1] == 3 and images.std() > 0
    assert pipeline.get_label_ids(["star"]) == [2]
    card = (out / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "0.5" in card


@pytest.mark.parametrize(
    ("to", "name"), [("fine_dist", "m"), ("diffusers", "m"), ("dit", "m.pt"), ("dit", "m.safetensors")]
)
def test_a_round_trip_through_any_format_is_exact(to, name, trained, tmp_path):
    out = tmp_path / name
    assert command(["export", "--model", str(trained), "--to", to, "--out", str(out)]) == 0
    hints = HintsConfig(num_heads=4)
    before, after = load_model(trained)[0], load_model(out, hints=hints)[0]
    assert before.arch == after.arch
    assert all(torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    card = out.with_suffix(".md") if to == "dit" else out / "README.md"
    assert "held out loss" in card.read_text()


def test_an_export_of_an_export_names_no_learngene_where_there_was_none(trained, tmp_path):
    for source, name in ((trained, "a"), (tmp_path / "a", "b"), (tmp_path / "b", "c")):
        assert command(["export", "--model", str(source), "--to", "fine_dist", "--out", str(tmp_path / name)]) == 0
        assert "| learngene (sha256) | none |" in (tmp_path / name / "README.md").read_text()


def test_weights_without_their_average_are_exported_on_request(trained, tmp_path):
    for weights in ("ema", "raw"):
        argv = ["export", "--model", str(trained), "--weights", weights, "--out", str(tmp_path / weights)]
        assert command(argv) == 0
    ema, raw = (load_model(tmp_path / weights)[0] for weights in ("ema", "raw"))
    batch = inputs(ema.arch)
    assert not torch.equal(ema(*batch), raw(*batch))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--to", "dit", "--out", "{}/m"], "ends in .pt"),
        (["--to", "dit", "--vae", "x", "--out", "{}/m.pt"], "only a diffusers folder"),
        (["--to", "onnx", "--out", "{}/m"], "diffusers"),
        (["--to", "diffusers", "--vae", "{}", "--out", "{}/m"], "AutoencoderKL"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(more, words, trained, tmp_path, capsys):
    argv = ["export", "--model", str(trained), *(word.format(tmp_path) for word in more)]
    assert words in refused(argv, capsys)
    assert not list(tmp_path.iterdir())


def test_a_vae_that_did_not_make_the_latents_is_refused(latent_model, tmp_path, capsys):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5).save_pretrained(
        tmp_path / "vae"
    )
    argv = ["export", "--model", str(latent_model), "--to", "diffusers", "--vae", str(tmp_path / "vae")]
    assert "0.18215" in refused([*argv, "--out", str(tmp_path / "m")], capsys)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("to", ["fine_dist", "diffusers", "dit"])
def test_a_full_disk_is_one_line_and_leaves_no_export(to, trained, tmp_path, capsys):
    """A limit on the size of files stands in for a full disk: both end a write half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    out = tmp_path / ("m.pt" if to == "dit" else "m")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        message = refused(["export", "--model", str(trained), "--to", to, "--out", str(out)], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "too large" in message
    assert not out.exists()


@pytest.mark.parametrize(("to", "name"), [("fine_dist", "m"), ("diffusers", "m"), ("dit", "m.pt")])
def test_what_would_be_pushed_is_the_export_with_its_card_and_licence(to, name, latent_model, tmp_path):
    from fine_dist.artifacts.hub import files_to_push

    out = tmp_path / name
    Image.new("RGB", (8, 8)).save(tmp_path / "drawn.png")
    words = ["export", "--model", str(latent_model), "--to", to, "--out", str(out)]
    assert command([*words, "--samples", str(tmp_path / "drawn.png")]) == 0
    files = files_to_push(out)
    [shown] = re.findall(r"!\[Samples of the model\]\((.*)\)", files["README.md"].read_text())
    assert files[shown].read_bytes() == (tmp_path / "drawn.png").read_bytes()
    assert all(path.is_file() for path in files.values()) and len(files) >= 2
    card = files["README.md"].read_text()
    assert "license: cc-by-nc-4.0" in card and "DDPM, noise prediction, 1000 linear steps" in card
    assert "| method |" in card and "| held out loss | 0.5 |" in card


def test_samples_that_are_no_png_are_refused_before_anything_is_written(latent_model, tmp_path, capsys):
    (tmp_path / "s.png").write_text("no picture")
    words = ["export", "--model", str(latent_model), "--out", str(tmp_path / "m"), "--samples", str(tmp_path / "s.png")]
    assert "is no PNG" in refused(words, capsys) and not (tmp_path / "m").exists()


def test_a_dry_run_of_a_push_says_what_would_be_uploaded_and_writes_nothing(latent_model, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["export", "--model", str(latent_model), "--out", str(out), "--push", "me/small-dit", "--dry-run"]
    assert command(argv) == 0
    said = capsys.readouterr().out
    assert "would upload it to me/small-dit of the Hugging Face Hub, under the licence cc-by-nc-4.0" in said
    assert not out.exists()


@pytest.mark.parametrize("name", ["small-dit", "a/b/c", "../x", "me/a--b", "me/"])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_written(name, latent_model, tmp_path, capsys):
    words = refused(["export", "--model", str(latent_model), "--out", str(tmp_path / "o"), "--push", name], capsys)
    assert "OWNER/MODEL" in words and not (tmp_path / "o").exists()


def test_weights_of_unknown_licence_are_not_pushed(trained, tmp_path):
    from fine_dist.artifacts.hub import files_to_push

    out = tmp_path / "m"
    assert command(["export", "--model", str(trained), "--out", str(out)]) == 0
    with pytest.raises(ArtifactError, match=r"names no licence.*--hints.licence"):
        files_to_push(out)
