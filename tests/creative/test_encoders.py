"""The encoders compute what transformers computes, from any position on; and where they are loaded from."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.creative import causal
from fine_dist.creative.encoder_sources import load_encoders
from fine_dist.creative.encoders import add_token, read_at_end
from fine_dist.creative.tiny import make_encoders, make_model, make_tokenizer
from tests.creative.conftest import TOKEN, grown, whole_forward

PROMPTS = [f"a photo of a {TOKEN} mixture", f"{TOKEN}", f"a {TOKEN} owl, a {TOKEN} teapot", f"an owl like a {TOKEN}"]
# Sums of a few dozen fp32 products in another order: 1e-5 of embeddings of size 1 is a hundred times their rounding.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_embeddings_are_those_of_transformers_over_the_padded_prompt(encoders):
    for encoder in encoders:
        row = torch.randn(encoder.width, generator=torch.Generator().manual_seed(0))
        expected = whole_forward(encoder, grown(encoder, row), PROMPTS)
        torch.testing.assert_close(encoder.embed(PROMPTS, row), expected, **CLOSE)


def test_what_stands_before_the_token_can_be_computed_once(encoders):
    """The same embeddings, and the same gradient of the row, from the first trainable position on (in float64, where
    nothing but a wrong equation could differ)."""
    for encoder in encoders:
        model = copy.deepcopy(encoder.model).double()
        ids = torch.tensor(encoder.ids(PROMPTS[0]))
        first = ids.tolist().index(encoder.token_id)
        results = []
        for cut in (0, 1, first):
            row = torch.nn.Parameter(torch.full((encoder.width,), 0.3, dtype=torch.float64))
            before = causal.cache(model, ids[:cut])
            assert before.length == cut
            x = torch.where((ids == encoder.token_id)[:, None], row, encoder.rows(ids).double())[None, cut:]
            ends = torch.tensor([len(ids) - 1 - cut])
            embedded = causal.pool(model, causal.run(model, x, before), ends)
            embedded.square().sum().backward()
            results.append((embedded.detach(), row.grad))
        for embedded, gradient in results[1:]:
            torch.testing.assert_close(embedded, results[0][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(gradient, results[0][1], rtol=1e-9, atol=1e-9)


def test_with_the_published_eos_id_words_behind_the_token_are_not_read_until_it_is_mended():
    """The trap: at `eos_token_id` 2 transformers reads the pooled output at the greatest id, which a new token has."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, width=32, layers=2, heads=2, projection=24, seed=1)
    assert model.config.eos_token_id == 2
    place = add_token(tokenizer, TOKEN, "here")
    model.resize_token_embeddings(place + 1, mean_resizing=False)
    prompts = [f"a photo of a {TOKEN} mixture", f"a photo of a {TOKEN} lantern"]
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        trapped = model(ids).text_embeds
        read_at_end(model, tokenizer, "here")
        mended = model(ids).text_embeds
    assert torch.equal(trapped[0], trapped[1])
    assert (mended[0] - mended[1]).abs().max() > 0.1


def test_a_vocabulary_whose_end_of_text_really_is_2_is_refused(encoders):
    model, tokenizer = make_encoders()[0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    with pytest.raises(ConfigError, match="end-of-text id of here is 2"):
        read_at_end(model, tokenizer, "here")


def test_a_pipelines_folder_one_encoder_and_a_whole_clip_give_the_same_encoder(encoders, pipeline_folder, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    found = load_encoders([str(pipeline_folder)], TOKEN)
    assert [encoder.key for encoder in found] == ["clip_l", "clip_g"]
    assert [encoder.hash() for encoder in found] == [encoder.hash() for encoder in encoders]
    assert not any(p.requires_grad for encoder in found for p in encoder.model.parameters())
    # one encoder, its tokenizer's files beside it
    shutil.copytree(pipeline_folder / "text_encoder_2", tmp_path / "one")
    shutil.copytree(pipeline_folder / "tokenizer_2", tmp_path / "one", dirs_exist_ok=True)
    (alone,) = load_encoders([str(tmp_path / "one")], TOKEN)
    assert alone.key == "clip_l" and alone.hash() == encoders[1].hash()
    # the text half of a CLIPModel
    text = encoders[0].model.config.to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 8, "patch_size": 8}  # fmt: skip
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    whole.save_pretrained(tmp_path / "whole")
    shutil.copytree(pipeline_folder / "tokenizer", tmp_path / "whole", dirs_exist_ok=True)
    (half,) = load_encoders([str(tmp_path / "whole")], TOKEN)
    assert torch.equal(half.model.text_projection.weight, whole.text_projection.weight)


def test_widths_of_the_published_encoders_name_them(encoders):
    from fine_dist.creative.encoder_sources import _keys

    def of_width(width):
        return make_model(encoders[0].tokenizer, width=width, layers=1, heads=4, projection=8, seed=0, vocab_size=8)

    assert _keys([of_width(1280)]) == ["clip_g"]
    assert _keys([of_width(1280), of_width(768)]) == ["clip_g", "clip_l"]
    assert _keys([of_width(32), of_width(32)]) == ["clip_l", "clip_g"]


def test_an_encoder_without_projection_is_refused_by_name(pipeline_folder, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(vocab_size=800, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                            num_attention_heads=2)  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(pipeline_folder / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"text_encoder \(CLIPTextModel\) has no projection"):
        load_encoders([str(tmp_path)], TOKEN)


@pytest.mark.parametrize("token", ["creative", "Mantis", "<|endoftext|>"])
def test_a_token_that_the_vocabulary_has_is_refused(token):
    with pytest.raises(ConfigError, match="in the vocabulary of clip_l already"):
        load_encoders(["tiny"], token)


def test_a_start_word_of_several_tokens_is_refused_naming_its_pieces(encoders):
    assert encoders[0].tokenizer.convert_ids_to_tokens(encoders[0].single("creative", "start")) == "creative</w>"
    with pytest.raises(ConfigError, match=r"start: 'creative mantis' is not one token of clip_l but creative</w> \+ "):
        encoders[0].single("creative mantis", "start")
    with pytest.raises(ConfigError, match="start: '<CreTok>' is not one token"):
        encoders[0].single(TOKEN, "start")


def test_a_prompt_beyond_the_encoders_reach_is_refused(encoders):
    with pytest.raises(ConfigError, match="has 82 tokens, and clip_l takes at most 77"):
        encoders[0].ids("owl " * 80)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub's cache, empty, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_without_a_network_a_hub_name_is_one_clear_message(no_network):
    with pytest.raises(ArtifactError, match="openai/clip-vit-large-patch14 cannot be fetched from the hub") as caught:
        load_encoders(["openai/clip-vit-large-patch14"], TOKEN)
    assert "copy its text encoders and tokenizers to a folder" in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_fetched_before_needs_no_network(encoders, pipeline_folder, no_network):
    """A pipeline and a single encoder, as the hub's client keeps them."""

    def keep(name):
        home = no_network / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("0" * 40)
        return home / "snapshots" / ("0" * 40)

    shutil.copytree(pipeline_folder, keep("someone/sd3"))
    index = {"text_encoder": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_2": ["transformers", "?"]}
    (no_network / "models--someone--sd3" / "snapshots" / ("0" * 40) / "model_index.json").write_text(json.dumps(index))
    found = load_encoders(["someone/sd3"], TOKEN)
    assert [encoder.hash() for encoder in found] == [encoder.hash() for encoder in encoders]
    alone = keep("someone/clip")
    shutil.copytree(pipeline_folder / "text_encoder", alone)
    shutil.copytree(pipeline_folder / "tokenizer", alone, dirs_exist_ok=True)
    assert load_encoders(["someone/clip"], TOKEN)[0].hash() == encoders[0].hash()


def test_what_is_missing_or_damaged_in_a_folder_is_named(pipeline_folder, tmp_path):
    with pytest.raises(ArtifactError, match="is no folder, nor a hub name"):
        load_encoders(["./nowhere"], TOKEN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty has no config\.json"):
        load_encoders([str(tmp_path / "empty")], TOKEN)
    shutil.copytree(pipeline_folder / "text_encoder", tmp_path / "bare")
    with pytest.raises(ArtifactError, match=r"bare has no (vocabulary|CLIP tokenizer)"):
        load_encoders([str(tmp_path / "bare")], TOKEN)
    shutil.copytree(pipeline_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="is no CLIP text encoder in safetensors"):
        load_encoders([str(tmp_path / "cut")], TOKEN)
    with pytest.raises(ConfigError, match="have 4 CLIP text encoders; give one or two"):
        load_encoders([str(pipeline_folder), "tiny"], TOKEN)
    shutil.copytree(pipeline_folder, tmp_path / "json")
    (tmp_path / "json" / "model_index.json").write_text(json.dumps({"text_encoder": 1})[:-2])
    with pytest.raises(ArtifactError, match=r"model_index\.json is damaged"):
        load_encoders([str(tmp_path / "json")], TOKEN)
