"""diffusers' folders that are not taken, each with one line: other models, unknown schedulers, damaged files."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from fine_dist.artifacts.diffusers_export import write_diffusers
from fine_dist.artifacts.reading import import_model
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.model.dit import DiT
from tests.artifacts.conftest import copied, rewrite
from tests.artifacts.conftest import diffusers_arch as arch


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
        import_model(folder)


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
        import_model(folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample'.*legal: linear, with epsilon or v_prediction"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule 'scaled_linear'"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"num_train_timesteps": "many"}, "scheduler_config.json is damaged"),
        ({"beta_start": -1}, "scheduler_config.json is damaged"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": []}, "scheduler_config.json is damaged"),
    ],
)
def test_a_scheduler_that_is_not_understood_is_refused_in_one_line(exported, tmp_path, values, words):
    folder = copied(exported[0], tmp_path)
    (folder / "fine_dist.json").unlink()
    rewrite(folder / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(ArtifactError, match=words) as error:
        import_model(folder)
    assert "\n" not in str(error.value)


def test_a_scheduler_is_read_and_one_that_was_changed_after_the_export_is_refused(exported, tmp_path):
    folder = copied(exported[0], tmp_path)
    rewrite(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=500, prediction_type="v_prediction")
    with pytest.raises(ArtifactError, match="name different processes"):
        import_model(folder)
    (folder / "fine_dist.json").unlink()
    found = import_model(folder).diffusion
    assert found.num_timesteps == 500 and found.predicts == "v"


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("fine_dist.json", {"num_classes": "ten"}, "fine_dist.json is damaged: num_classes"),
        ("fine_dist.json", {"diffusion": {"process": "magic"}}, "fine_dist.json is damaged: diffusion.process"),
        ("model_index.json", {"id2label": ["a"]}, "id2label must map"),
        ("vae/config.json", {"scaling_factor": "big"}, "scaling_factor of its vae is 'big'"),
        ("transformer/config.json", {"norm_eps": "small"}, "norm_eps is 'small'"),
    ],
)
def test_altered_files_beside_the_weights_are_one_line(exported, tmp_path, name, values, words):
    folder = copied(exported[0], tmp_path)
    rewrite(folder / name, **values)
    with pytest.raises(ArtifactError, match=words) as error:
        import_model(folder)
    assert "\n" not in str(error.value)


def test_weights_outside_the_folder_are_not_read(exported, tmp_path):
    folder = copied(exported[0], tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="copy the model's folder whole"):
        import_model(folder)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ArtifactError, match="outside its folder"):
        import_model(folder)
    for damaged in ({"weight_map": ["a"]}, {"weight_map": {"a": 3}}, {}):
        index.write_text(json.dumps(damaged))
        with pytest.raises(ArtifactError, match="weight_map must map"):
            import_model(folder)
    index.write_text("[1]")
    with pytest.raises(ArtifactError, match="is damaged: input should be a valid dictionary"):
        import_model(folder)


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
        import_model("fine-dist-tests/no-such-model")
    assert "transformer/" in str(error.value) and "give its path" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "/nowhere/at/all"])
def test_a_path_that_is_not_there_is_not_taken_for_a_name(source):
    with pytest.raises(ArtifactError, match="no such file or folder, and a name"):
        import_model(source)


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="holds no model"):
        import_model(tmp_path)
