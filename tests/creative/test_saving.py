"""Tokens on disk, and in real diffusers pipelines made of tiny random parts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.creative.saving import combined_name, load_cretok, plain_prompt, read_token, save_token
from fine_dist.creative.tiny import make_encoders
from tests.creative.conftest import TOKEN

PROMPT = f"a photo of a {TOKEN} mixture"


def rows_of(*widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(width, generator=generator) for key, width in zip(("clip_l", "clip_g"), widths)}


@pytest.fixture
def token_folder(tmp_path):
    save_token(tmp_path / "run" / "token", TOKEN, rows_of(32, 48), {"steps": 3}, rows_of(32, 48, seed=1))
    return tmp_path / "run" / "token"


def test_the_files_are_those_that_diffusers_and_comfyui_want(tmp_path):
    rows = rows_of(768, 1280)
    manifest = save_token(tmp_path / "token", TOKEN, rows, {"steps": 3})
    for name, key, width in (("learned_embeds", "clip_l", 768), ("learned_embeds_2", "clip_g", 1280)):
        with safe_open(tmp_path / "token" / f"{name}.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"} and list(file.keys()) == [TOKEN]
            assert torch.equal(file.get_tensor(TOKEN), rows[key][None]) and file.get_tensor(TOKEN).shape == (1, width)
    both = load_file(tmp_path / "token" / "CreTok.safetensors")
    assert {key: tuple(row.shape) for key, row in both.items()} == {"clip_l": (1, 768), "clip_g": (1, 1280)}
    assert sorted(manifest["sha256"]) == [
        "CreTok.safetensors",
        "learned_embeds.safetensors",
        "learned_embeds_2.safetensors",
    ]
    saved = read_token(tmp_path)  # the run's directory will do
    assert saved.token == TOKEN and torch.equal(saved.rows["clip_g"][0], rows["clip_g"]) and saved.control == {}
    assert combined_name("<a b?>") == "ab.safetensors"
    assert combined_name("learned_embeds") == "token_learned_embeds.safetensors"  # no file takes another's place


def test_a_folder_is_replaced_as_a_whole(token_folder):
    save_token(token_folder, TOKEN, rows_of(32), {"steps": 4})
    assert sorted(path.name for path in token_folder.iterdir()) == [
        "CreTok.safetensors", "learned_embeds.safetensors", "manifest.json",
    ]  # fmt: skip
    assert [path.name for path in token_folder.parent.iterdir()] == ["token"]


def test_a_damaged_folder_is_refused_naming_the_file(token_folder, tmp_path):
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_token(tmp_path / "nowhere")
    name = "learned_embeds_2.safetensors"
    content = bytearray((token_folder / name).read_bytes())
    content[-1] ^= 1
    (token_folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} does not match its manifest"):
        read_token(token_folder)
    (token_folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"a manifest but no {name}"):
        read_token(token_folder)
    (token_folder / "manifest.json").write_text(json.dumps({"format": 1, "kind": "learngene"}))
    with pytest.raises(ArtifactError, match="is not a token of this version"):
        read_token(token_folder)
    (token_folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_token(token_folder)


# --- Stable Diffusion 3 --------------------------------------------------------------------------------------------


def sd3(**parts):
    """A real StableDiffusion3Pipeline of tiny random parts; its third text encoder is absent, as users drop it."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    (model, tokenizer), (model_2, tokenizer_2) = make_encoders()
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=96, caption_projection_dim=16, pooled_projection_dim=24 + 40, out_channels=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4,), layers_per_block=1, latent_channels=4,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    given = {
        "transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae, "text_encoder": model,
        "tokenizer": tokenizer, "text_encoder_2": model_2, "tokenizer_2": tokenizer_2, "text_encoder_3": None,
        "tokenizer_3": None,
    }  # fmt: skip
    pipe = StableDiffusion3Pipeline(**{**given, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, **more):
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        prompt, num_inference_steps=2, height=8, width=8, generator=generator, output_type="np", **more
    ).images
    assert np.isfinite(images).all()
    return images[0]


def test_stable_diffusion_3_draws_an_image_with_the_token(token_folder):
    pipe = sd3()
    assert load_cretok(pipe, token_folder) == TOKEN
    for tokenizer, encoder, row in zip(
        (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2), rows_of(32, 48).values()
    ):
        ids = tokenizer(PROMPT).input_ids
        assert len(ids) == 8 and torch.equal(encoder.get_input_embeddings().weight[ids[5]], row)
    image = draw(pipe, PROMPT)
    assert image.shape == (8, 8, 3)
    assert np.array_equal(image, draw(pipe, PROMPT))
    # the token means its row: another row, another image; and the words behind it are read
    with torch.no_grad():
        pooled = [pipe.encode_prompt(p, p, p)[2] for p in (PROMPT, f"a photo of a {TOKEN} lantern")]
        assert (pooled[0] - pooled[1]).abs().max() > 0.1
        pipe.text_encoder.get_input_embeddings().weight[-1] += 1
    assert not np.array_equal(image, draw(pipe, PROMPT))


def test_a_pipeline_keeps_the_token_when_it_is_saved_and_loaded(token_folder, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    pipe = sd3()
    load_cretok(pipe, token_folder)
    pipe.save_pretrained(tmp_path / "pipe")
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipe", text_encoder_3=None, tokenizer_3=None)
    again.set_progress_bar_config(disable=True)
    assert np.allclose(draw(again, PROMPT), draw(pipe, PROMPT), atol=1e-5)


def test_other_prompts_keep_their_meaning(token_folder):
    before = draw(sd3(), "a photo of an owl")
    pipe = sd3()
    load_cretok(pipe, token_folder)
    assert np.allclose(draw(pipe, "a photo of an owl"), before, atol=1e-6)


def test_a_token_that_does_not_fit_or_is_known_leaves_the_pipeline_as_it_was(token_folder, tmp_path):
    pipe = sd3()
    save_token(tmp_path / "wide", TOKEN, rows_of(32, 64), {})
    with pytest.raises(ArtifactError, match=r"are 32 and 48 wide, and the token has rows for clip_l 32, clip_g 64"):
        load_cretok(pipe, tmp_path / "wide")
    pipe.tokenizer_2.add_tokens(TOKEN)
    with pytest.raises(ConfigError, match="in the vocabulary of tokenizer 2 of StableDiffusion3Pipeline already"):
        load_cretok(pipe, token_folder)
    assert TOKEN not in pipe.tokenizer.get_vocab() and len(pipe.text_encoder.get_input_embeddings().weight) == 782


def test_encoders_that_do_not_know_the_token_get_a_plain_prompt():
    assert plain_prompt(PROMPT) == "a photo of a creative mixture"
    assert plain_prompt("A <cretok> owl", word="strange") == "A strange owl"


# --- SDXL and Stable Diffusion 1.5 ---------------------------------------------------------------------------------


def unet(cross, **more):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=2, **more,
    )  # fmt: skip


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1)


def without_projection(model):
    """An encoder as SDXL's first and SD1.5's are: the text model alone."""
    from transformers import CLIPTextModel

    plain = CLIPTextModel(model.config)
    plain.load_state_dict(model.text_model.state_dict())
    return plain.eval()


def test_sdxl_takes_the_same_token(token_folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    (model, tokenizer), (model_2, tokenizer_2) = make_encoders()
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 6 * 8 + 40}  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=vae(), text_encoder=without_projection(model), text_encoder_2=model_2, tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=unet(32 + 48, **extra), scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    load_cretok(pipe, token_folder.parent)
    assert not np.array_equal(draw(pipe, PROMPT), draw(pipe, plain_prompt(PROMPT)))
    pooled = [pipe.encode_prompt(p)[2] for p in (PROMPT, f"a photo of a {TOKEN} lantern")]
    assert (pooled[0] - pooled[1]).abs().max() > 0.1


def test_stable_diffusion_15_takes_it_by_diffusers_own_load_textual_inversion(token_folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    model, tokenizer = make_encoders()[0]
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=without_projection(model), tokenizer=tokenizer, unet=unet(32), safety_checker=None,
        scheduler=DDIMScheduler(), feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(token_folder), weight_name="learned_embeds.safetensors")
    ids = pipe.tokenizer(PROMPT).input_ids
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids[5]], rows_of(32)["clip_l"])
    assert not np.array_equal(draw(pipe, PROMPT), draw(pipe, plain_prompt(PROMPT)))


def test_a_copied_token_is_whole(token_folder, tmp_path):
    shutil.copytree(token_folder, tmp_path / "elsewhere")
    assert read_token(tmp_path / "elsewhere").manifest == read_token(token_folder).manifest
    assert torch.equal(read_token(tmp_path / "elsewhere").control["clip_l"][0], rows_of(32, seed=1)["clip_l"])
