"""diffusers' folders: real `DiTPipeline` loads and samples them; time frequencies, embedders, licences, bad folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fine_dist.artifacts.card import ModelCard
from fine_dist.artifacts.diffusers_export import load_pipeline, set_frequencies, write_diffusers
from fine_dist.artifacts.external import load
from fine_dist.artifacts.imported import Hints
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.diffusion.samplers import image_generator, sample
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import save_artifact
from fine_dist.model.dit import DiT
from tests.conftest import inputs, lively, tiny_arch


def arch(**fields) -> Arch:
    return tiny_arch(**{"num_layers": 2, "in_channels": 4, "learn_sigma": True, **fields})


@pytest.fixture(scope="module")
def model() -> DiT:
    return lively(DiT(arch()), std=0.1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model, vae):
    folder = tmp_path_factory.mktemp("out") / "pipe"
    names = tuple(f"class {i}" for i in range(10))
    card = ModelCard("fine", "ab" * 32, "cc-by-nc-4.0", "facebook/DiT-XL-2-256", {"FID-5k (ddim 50, guidance 1)": 12.5})
    written = write_diffusers(
        folder, model.arch, model.state_dict(), vae=vae, scaling_factor=0.5, class_names=names, card=card
    )
    return folder, written


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
    back = load(folder)
    assert back.arch == model.arch and back.layout == "diffusers"
    assert all(torch.equal(back.state[key], value) for key, value in model.state_dict().items())
    assert back.licence == "cc-by-nc-4.0" and back.scaling_factor == 0.5 and back.class_names[3] == "class 3"
    assert load(folder / "transformer", Hints(num_classes=10, frequency_shift=0)).arch == model.arch


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
    found = load(tmp_path / "m", Hints(frequency_shift=shift) if shift == 0 else Hints())
    assert found.arch.frequency_shift == shift and found.arch.num_classes == 10
    ours = DiT(found.arch)
    ours.load_state_dict(found.state)
    z, t, y = inputs(found.arch)
    with torch.no_grad():
        torch.testing.assert_close(ours(z, t, y), theirs(z, t, y).sample, atol=1e-5, rtol=1e-4)
    written = write_diffusers(tmp_path / "again", found.arch, found.state)
    assert not written.pipeline and written.max_error < 1e-5
    assert (written.stock_error < 1e-5) == (shift == 1)
    assert load(tmp_path / "again").arch == found.arch


def test_the_published_folders_config_name_tells_that_they_are_converted(exported, tmp_path):
    folder = copied(exported[0], tmp_path)
    (folder / "fine_dist.json").unlink()
    rewrite(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    found = load(folder)
    assert found.arch.frequency_shift == 0 and found.arch.num_classes == 1000
    assert any("converted from the original" in note for note in found.notes)
    rewrite(folder / "transformer" / "config.json", _class_name="DiTTransformer2DModel")
    assert load(folder).arch.frequency_shift == 1


def test_weights_in_pieces_and_in_half_precision_come_in(exported, model, tmp_path):
    from diffusers import DiTTransformer2DModel

    folder = copied(exported[0], tmp_path)
    half = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float16)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    half.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    back = load(folder)
    torch.testing.assert_close(
        back.state["blocks.1.qkv.weight"], model.state_dict()["blocks.1.qkv.weight"], atol=1e-3, rtol=1e-3
    )
    assert back.state["label.weight"].dtype == torch.float32


def test_our_own_models_come_in_with_their_licence(tmp_path, model):
    save_artifact(
        tmp_path / "m", kind="model", method={"name": "fine"}, arch=model.arch, tensors=model.state_dict(),
        extra={"ancestor": {"licence": "cc-by-nc-4.0"}, "diffusion": {"num_timesteps": 100}},
    )  # fmt: skip
    found = load(tmp_path / "m")
    assert found.licence == "cc-by-nc-4.0" and found.diffusion.num_timesteps == 100
    assert all(torch.equal(found.state[key], value) for key, value in model.state_dict().items())
    save_artifact(tmp_path / "g", kind="learngene", method={"name": "fine"}, arch=model.arch, tensors={})
    with pytest.raises(ArtifactError, match="learngene"):
        load(tmp_path / "g")


# --- what cannot be --------------------------------------------------------------------------------------------------


def copied(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder, change):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_blocks_with_embedders_of_their_own_are_refused_by_name(exported, tmp_path):
    folder = copied(exported[0], tmp_path)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    change_tensors(folder, lambda tensors: tensors[name].add_(1e-3))
    with pytest.raises(ArtifactError, match=name):
        load(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ({"_class_name": "UNet2DConditionModel"}, "of a UNet2DConditionModel"),
        ({"out_channels": 5}, "out_channels is 5"),
        ({"num_layers": 3}, "missing: transformer_blocks.2"),
        ({"attention_head_dim": "many"}, "no possible DiT"),
        ({"sample_size": 9}, "no possible DiT"),
    ],
)
def test_configs_of_other_models_are_named(exported, tmp_path, values, words):
    folder = copied(exported[0], tmp_path)
    rewrite(folder / "transformer" / "config.json", **values)
    with pytest.raises(ArtifactError, match=words):
        load(folder)


def test_a_scheduler_of_another_chain_is_read_or_refused(exported, tmp_path):
    folder = copied(exported[0], tmp_path)
    rewrite(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=500)
    assert load(folder).diffusion.num_timesteps == 500
    rewrite(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(ArtifactError, match="v_prediction"):
        load(folder)


def test_weights_outside_the_folder_are_not_read(exported, tmp_path):
    folder = copied(exported[0], tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="copy the model's folder whole"):
        load(folder)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ArtifactError, match="outside its folder"):
        load(folder)


def test_a_vae_that_did_not_make_the_latents_is_refused(tmp_path, model, vae):
    with pytest.raises(ArtifactError, match=r"scaling_factor is 0.5, .* scaled by 0.18215"):
        write_diffusers(tmp_path / "a", model.arch, model.state_dict(), vae=vae, scaling_factor=0.18215)
    other = arch(in_channels=3)
    with pytest.raises(ArtifactError, match="4 channels, not 3"):
        write_diffusers(tmp_path / "a", other, DiT(other).state_dict(), vae=vae)
    with pytest.raises(ArtifactError, match="no AutoencoderKL"):
        write_diffusers(tmp_path / "a", model.arch, model.state_dict(), vae=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_export_overwrites_nothing_and_wants_one_name_a_class(exported, tmp_path, model):
    with pytest.raises(ConfigError, match="exists already"):
        write_diffusers(exported[0], model.arch, model.state_dict())
    with pytest.raises(ConfigError, match="1 class names for 10"):
        write_diffusers(tmp_path / "a", model.arch, model.state_dict(), class_names=("one",))


def test_a_wrong_export_is_found_out_and_not_kept(tmp_path, model, monkeypatch):
    from fine_dist.artifacts import diffusers_export as diffusers_out

    def swapped(arch, state):
        theirs = diffusers_io_to(arch, state)
        theirs["transformer_blocks.0.attn1.to_q.weight"] = theirs["transformer_blocks.0.attn1.to_k.weight"].clone()
        return theirs

    diffusers_io_to = diffusers_out.to_diffusers
    monkeypatch.setattr(diffusers_out, "to_diffusers", swapped)
    with pytest.raises(ArtifactError, match="outputs differ"):
        write_diffusers(tmp_path / "a", model.arch, model.state_dict())
    assert not list(tmp_path.iterdir())


def test_a_hub_name_without_network_says_what_to_download(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError) as error:
        load("fine-dist-tests/no-such-model")
    assert "transformer/" in str(error.value) and "give its path" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "/nowhere/at/all"])
def test_a_path_that_is_not_there_is_not_taken_for_a_name(source):
    with pytest.raises(ArtifactError, match="no such file or folder, and a name"):
        load(source)


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="holds no model"):
        load(tmp_path)
