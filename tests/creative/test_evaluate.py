"""Cosines to held-out pairs beside the controls, nearest words, the report, and CLIP scores of images."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fine_dist.core.errors import ArtifactError, DataError
from fine_dist.creative import command as creative
from fine_dist.creative.clip_scores import clip_scores
from fine_dist.creative.config import Template
from fine_dist.creative.evaluate import RANDOM_ROWS, HeldOutPairs, NearestWords, measure, random_rows
from fine_dist.creative.reevaluate import evaluate_again
from fine_dist.creative.tokens import RowSpec, Tokens
from tests.creative.conftest import TOKEN, grown, tiny_config, whole_forward

PAIRS = [("owl", "teapot"), ("fox", "clock"), ("crab", "lamp")]


def naive_cosine(encoder, model, template, word):
    """Pair by pair and order by order, through transformers' own forward pass."""
    found = []
    for first, second in PAIRS:
        for t1, t2 in ((first, second), (second, first)):
            prompts = [template.adaptive.format(token=word, t1=t1, t2=t2), template.restrictive.format(t1=t1, t2=t2)]
            with torch.no_grad():
                adaptive, restrictive = whole_forward(encoder, model, prompts)
            found.append(float(F.cosine_similarity(adaptive, restrictive, dim=0)))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "template", [Template(), Template(adaptive="a {t2} as a {token} {t1}")], ids=["plain", "slots"]
)
def test_cosines_and_controls_are_what_their_names_say(encoders, template):
    rows = {encoder.key: torch.randn(encoder.width, generator=torch.Generator().manual_seed(2)) for encoder in encoders}
    found = measure(encoders, template, PAIRS, token=TOKEN, start="mixture", rows={"mine": rows})
    assert list(found) == ["mine", 'the word "creative"', 'the start word, "mixture"', "a random row (mean of 16)"]
    for encoder in encoders:
        model = grown(encoder, rows[encoder.key])
        expected = {"mine": TOKEN, 'the word "creative"': "creative", 'the start word, "mixture"': "mixture"}
        for what, word in expected.items():
            assert found[what][encoder.key] == pytest.approx(naive_cosine(encoder, model, template, word), abs=1e-5)
        drawn = [naive_cosine(encoder, grown(encoder, row), template, TOKEN) for row in random_rows(encoder)]
        assert len(drawn) == RANDOM_ROWS
        assert found["a random row (mean of 16)"][encoder.key] == pytest.approx(np.mean(drawn), abs=1e-5)
    assert found["mine"]["mean"] == pytest.approx((found["mine"]["clip_l"] + found["mine"]["clip_g"]) / 2)


def test_random_rows_are_spread_as_the_vocabulary_is(encoders):
    rows, table = random_rows(encoders[0]), encoders[0].table
    assert torch.equal(rows, random_rows(encoders[0]))
    assert abs(float(rows.std() / table.std()) - 1) < 0.15  # 512 draws: the deviation's own error is 3%


def test_what_is_shown_while_a_run_trains_is_named_by_run_and_leaves_the_controls_out(encoders):
    specs = [RowSpec(Template(), 0), RowSpec(Template(), 1), RowSpec(Template(), 0, True), RowSpec(Template(), 1, True)]
    model = Tokens(encoders, specs, [("bat", "sofa"), *PAIRS], token=TOKEN, start="creative")
    with torch.no_grad():
        model.clip_l[1] = encoders[0].table[encoders[0].single("lantern", "start")] * 2
    found = HeldOutPairs(["s0", "s1"], 1, 4, 0.5)(model)
    assert set(found) == {f"{what}/{name}" for name in ("s0", "s1") for what in (
        "held_out_cosine", "held_out_loss", "norm_clip_l", "norm_clip_g")}  # fmt: skip
    start = measure(encoders, Template(), PAIRS, token=TOKEN, start="creative", rows={})['the start word, "creative"']
    assert found["held_out_cosine/s0"] == pytest.approx(start["mean"], abs=1e-5)
    assert found["norm_clip_l/s1"] == pytest.approx(model.clip_l[1].norm().item(), rel=1e-5)
    words = NearestWords(["s0", "s1"])(model)
    assert words["nearest/clip_l/s1"].startswith("`lantern` 1.000")
    assert words["nearest/clip_g/s1"].startswith("`creative` 1.000")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, pipeline_folder):
    """A short run on encoders from a folder."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(pipeline_folder, folder / "encoders")
    return creative.run(tiny_config(folder / "run", encoders=[str(folder / "encoders")]))


def test_a_token_measured_again_has_the_numbers_of_its_report(run_folder, capsys):
    before = (run_folder / "report.md").read_text()
    assert creative.main(["--evaluate", str(run_folder)]) == 0
    again = capsys.readouterr().out
    table = [line for line in before.splitlines() if line.startswith("|")]
    assert len(table) == 7 and all(line in again for line in table)
    for words in (
        "never trained on",
        "VQAScore 0.835, PickScore 21.775 and ImageReward 1.065",
        "This report does not measure images",
    ):
        assert " ".join(words.split()) in " ".join(again.split())
    assert "CLIP score" not in again


def test_a_token_is_not_measured_on_other_encoders(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "token" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["encoder_sha256"]["clip_g"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"clip_g of .* is not what the token was trained on"):
        evaluate_again(tmp_path / "run")


# --- CLIP scores ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory, encoders):
    """A tiny random CLIP with both halves, on disk."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 24, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    text = {**encoders[0].model.config.to_dict(), "eos_token_id": encoders[0].tokenizer.eos_token_id}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    encoders[0].tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """Pictures that are larger than the model's and not square: smooth, so that resampling is not what is compared."""
    rng = np.random.default_rng(0)
    for index, size in enumerate([(60, 40), (40, 64), (24, 24)]):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{index}.png")
    return tmp_path


def test_clip_scores_are_those_of_transformers_own_processor(clip, images):
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    prompts = {"0.png": "an owl teapot", "1.png": "a fox clock", "2.png": "a creative mixture"}
    lines = [f"{name},{prompt}" for name, prompt in list(prompts.items())[:2]]
    (images / "prompts.csv").write_text("file,prompt\n" + "\n".join(lines) + "\n")
    cosines = []
    for name, prompt in prompts.items():
        pixels = CLIPImageProcessorPil.from_pretrained(clip)(Image.open(images / name), return_tensors="pt")
        with torch.no_grad():
            out = model(**tokenizer(prompt, return_tensors="pt"), pixel_values=pixels["pixel_values"])
        cosines.append(float((out.image_embeds * out.text_embeds).sum()))
    found = clip_scores(images, clip, "a creative mixture")
    assert found.num_images == 3
    # Both resize bicubically in 8 bits; a pixel may round the other way.
    assert found.mean == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), abs=0.2)
    assert max(cosines) > 0.05  # so that the clamp does not decide


def test_a_report_with_images_says_what_they_were_scored_against(run_folder, clip, images, capsys):
    argv = ["--evaluate", str(run_folder), "--images", str(images), "--clip", str(clip)]
    assert creative.main(argv) == 0
    text = capsys.readouterr().out
    assert 'CLIP score of 3 images against "a photo of a creative mixture"' in text
    assert text.strip() == (run_folder / "report.md").read_text().strip()


def test_images_that_cannot_be_scored_are_named(clip, images, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"has no images; legal endings: \.png"):
        clip_scores(tmp_path / "none", clip, "an owl")
    with pytest.raises(ArtifactError, match="is no local folder of a CLIP model"):
        clip_scores(images, tmp_path / "none", "an owl")
    (images / "prompts.csv").write_text("file,prompt\n7.png,an owl\n")
    with pytest.raises(DataError, match=r"there is no file '7\.png' in"):
        clip_scores(images, clip, "an owl")
    (images / "prompts.csv").write_text("image,text\n")
    with pytest.raises(DataError, match="columns file and prompt are needed"):
        clip_scores(images, clip, "an owl")
    (images / "prompts.csv").unlink()
    (images / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        clip_scores(images, clip, "an owl")
