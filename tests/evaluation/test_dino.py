"""DINOv2 from a transformers folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_dist.core.errors import ArtifactError
from fine_dist.evaluation.features import load_features


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
