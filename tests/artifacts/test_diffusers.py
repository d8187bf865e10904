"""diffusers' folders: real `DiTPipeline` loads and samples them; time frequencies, weights in pieces."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from fine_dist.artifacts.diffusers_export import load_pipeline, set_frequencies, write_diffusers
from fine_dist.artifacts.reading import import_model
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.diffusion.samplers import image_generator, sample
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.dit import DiT
from tests.artifacts.conftest import copied, rewrite
from tests.conftest import inputs


def test_the_export_says_how_far_diffusers_is_with_and_without_the_models_frequencies(exported):
    _, written = exported
    assert written.pipeline and written.max_error < 1e-5
    assert written.stock_error > 1e-3  # other frequencies are another function


def test_real_pipelines_sample_it_with_guidance(exported, tmp_path):
    """DiTPipeline guides with label 1000; with its own noise our sampler gives the very same latents."""
    from diffusers import DiTPipeline

    folder, _ = exported
    for pipeline in (load_pipeline(folder), DiTPipeline.from_pretrained(folder)):
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.get_label_ids(["class 3", "class 9"]) == [3, 9]
        images = pipeline([3, 9, 0], guidance_scale=1.5, num_inference_steps=5, output_type="np").images
        assert images.shape == (3, 16, 16, 3) and 0 <= images.min() < images.max() <= 1
        pipeline.numpy_to_pil(images)[0].save(tmp_path / "picture.png")


def test_our_sampler_and_the_pipeline_draw_the_same_images(exported, model, monkeypatch):
    folder, _ = exported
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    decoded = []
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: decoded.append(z) or type("D", (), {"sample": z[:, :3]}))
    generators = [image_generator(5, i) for i in range(3)]
    pipeline([3, 9, 0], generator=generators, guidance_scale=1.5, num_inference_steps=10, output_type="pt")
    ours = sample(
        model,
        labels=torch.tensor([3, 9, 0]),
        arch=model.arch,
        config=SamplerConfig(scheduler="ddim", steps=10, guidance=1.5),
        diffusion=DiffusionConfig(),
        seed=5,
    )
    theirs = decoded[0] * 0.5
    # ten steps in fp32; the first divides by sqrt(alpha_bar_T), 1/160
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_round_trip_is_bit_exact_and_keeps_what_the_files_know(exported, model):
    folder, _ = exported
    back = import_model(folder)
    assert back.arch == model.arch and back.layout == "diffusers"
    assert all(torch.equal(back.state[key], value) for key, value in model.state_dict().items())
    assert back.licence == "cc-by-nc-4.0" and back.scaling_factor == 0.5 and back.class_names[3] == "class 3"
    assert import_model(folder / "transformer", HintsConfig(num_classes=10, frequency_shift=0)).arch == model.arch


def test_the_card_says_where_it_comes_from(exported):
    text = (exported[0] / "README.md").read_text()
    for word in ("license: cc-by-nc-4.0", "ab" * 32, "FID-5k (ddim 50, guidance 1) | 12.5", "downscale_freq_shift = 0"):
        assert word in text, text


@pytest.mark.parametrize("shift", [0, 1])
def test_a_model_trained_in_diffusers_keeps_its_function_and_one_converted_from_dit_keeps_dits(tmp_path, shift):
    """The same folder means two functions; which one is decided by where it comes from, or said."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    embedders = [block.norm1.emb for block in theirs.transformer_blocks]
    embedders[1].load_state_dict(embedders[0].state_dict())
    theirs.save_pretrained(tmp_path / "m")
    set_frequencies(theirs, shift)
    found = import_model(tmp_path / "m", HintsConfig(frequency_shift=shift) if shift == 0 else HintsConfig())
    assert found.arch.frequency_shift == shift and found.arch.num_classes == 10
    ours = DiT(found.arch)
    ours.load_state_dict(found.state)
    z, t, y = inputs(found.arch)
    with torch.no_grad():
        torch.testing.assert_close(ours(z, t, y), theirs(z, t, y).sample, atol=1e-5, rtol=1e-4)
    written = write_diffusers(tmp_path / "again", found.arch, found.state)
    assert not written.pipeline and written.max_error < 1e-5
    assert (written.stock_error < 1e-5) == (shift == 1)
    assert import_model(tmp_path / "again").arch == found.arch


def test_the_published_folders_config_name_tells_that_they_are_converted(exported, tmp_path):
    folder = copied(exported[0], tmp_path)
    (folder / "fine_dist.json").unlink()
    rewrite(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    found = import_model(folder)
    assert found.arch.frequency_shift == 0 and found.arch.num_classes == 1000
    assert any("converted from the original" in note for note in found.notes)
    rewrite(folder / "transformer" / "config.json", _class_name="DiTTransformer2DModel")
    assert import_model(folder).arch.frequency_shift == 1


def test_weights_in_pieces_and_in_half_precision_come_in(exported, model, tmp_path):
    from diffusers import DiTTransformer2DModel

    folder = copied(exported[0], tmp_path)
    half = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float16)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    half.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    back = import_model(folder)
    torch.testing.assert_close(
        back.state["blocks.1.qkv.weight"], model.state_dict()["blocks.1.qkv.weight"], atol=1e-3, rtol=1e-3
    )
    assert back.state["label.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [{"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "200KB"}, {"safe_serialization": False}],
    ids=["one file", "pieces", "bin"],
)
def test_variants_come_in_whole_and_in_pieces_and_are_said(exported, model, tmp_path, options):
    from diffusers import DiTTransformer2DModel

    folder = copied(exported[0], tmp_path)
    half = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float16)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    half.save_pretrained(folder / "transformer", **options)
    back = import_model(folder)
    wanted = model.state_dict()["blocks.1.qkv.weight"].half().float()
    assert torch.equal(back.state["blocks.1.qkv.weight"], wanted)
    assert any("variant fp16" in note for note in back.notes) == ("variant" in options)


def test_files_without_a_variant_are_preferred_as_the_more_exact(exported, model, tmp_path):
    folder = copied(exported[0], tmp_path)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path.with_name(path.stem + ".fp16.safetensors"))
    assert torch.equal(import_model(folder).state["blocks.1.o.weight"], model.state_dict()["blocks.1.o.weight"])


# --- processes -------------------------------------------------------------------------------------------------------

SIT = DiffusionConfig(process="flow", time_shift=1.5)
RECTIFIED = DiffusionConfig(process="flow", direction="data_to_noise", time_scale=1000.0)
ZERO = DiffusionConfig(prediction="v", zero_terminal_snr=True, num_timesteps=500)


@pytest.mark.parametrize("diffusion", [SIT, RECTIFIED, ZERO], ids=["sit", "rectified", "zero_snr"])
def test_a_process_survives_export_and_import(model, tmp_path, diffusion):
    write_diffusers(tmp_path / "m", model.arch, model.state_dict(), diffusion=diffusion)
    assert import_model(tmp_path / "m").diffusion == diffusion
    (tmp_path / "m" / "fine_dist.json").unlink()  # as diffusers itself would have written it
    found = import_model(tmp_path / "m").diffusion
    assert found.process == diffusion.process and found.predicts == diffusion.predicts
    assert found.zero_terminal_snr == diffusion.zero_terminal_snr and found.time_shift == diffusion.time_shift
    if diffusion.process == "flow":
        assert (found.direction, found.time_scale) == ("data_to_noise", 1000.0)  # what diffusers' scheduler means


@pytest.mark.parametrize("diffusion", [SIT, RECTIFIED], ids=["sit", "rectified"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_exported_flow_is_a_pipeline_that_draws_our_images(model, vae, tmp_path, diffusion, guidance):
    from diffusers import DiffusionPipeline

    folder = tmp_path / "pipe"
    written = write_diffusers(folder, model.arch, model.state_dict(), vae=vae, scaling_factor=0.5, diffusion=diffusion)
    assert written.pipeline
    ours = sample(
        model,
        labels=torch.tensor([3, 9]),
        arch=model.arch,
        config=SamplerConfig(steps=6, guidance=guidance),
        diffusion=diffusion,
        seed=5,
    )
    by_itself = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for pipeline in (load_pipeline(folder), by_itself):
        pipeline.set_progress_bar_config(disable=True)
        generators = [image_generator(5, i) for i in range(2)]
        settings = {"generator": generators, "guidance_scale": guidance, "num_inference_steps": 6}
        theirs = pipeline([3, 9], **settings, output_type="latent").images
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert pipeline([3], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


def test_an_exported_v_model_is_a_pipeline_that_draws_our_images(model, vae, tmp_path, monkeypatch):
    write_diffusers(tmp_path / "m", model.arch, model.state_dict(), vae=vae, scaling_factor=0.5, diffusion=ZERO)
    pipeline = load_pipeline(tmp_path / "m")
    pipeline.set_progress_bar_config(disable=True)
    decoded = []
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: decoded.append(z) or type("D", (), {"sample": z[:, :3]}))
    generators = [image_generator(5, i) for i in range(2)]
    pipeline([3, 9], generator=generators, guidance_scale=1.0, num_inference_steps=10, output_type="pt")
    ours = sample(
        model,
        labels=torch.tensor([3, 9]),
        arch=model.arch,
        config=SamplerConfig(scheduler="ddim", steps=10),
        diffusion=ZERO,
        seed=5,
    )
    torch.testing.assert_close(ours, decoded[0] * 0.5, atol=1e-4, rtol=1e-4)
