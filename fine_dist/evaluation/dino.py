"""DINOv2 features (arXiv 2304.07193) through transformers, for the Fréchet DINO distance, FDD (arXiv 2306.04675).

Shapes: N images, E width, h, w rows and columns of patches, S patches. Images are resized to 224 x 224 bicubically with
antialiasing and normalized with ImageNet's mean and deviation; the features are the class token of the last, normalized
layer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.core.files import sha256_of
from fine_dist.evaluation.feature_network import Extracted, as_rgb

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoV2(nn.Module):
    """`features(images) -> Extracted`; a `feature_network.Features`. Made by `load_dino`."""

    name, distance = "dinov2", "FDD"

    def __init__(self, model: Any, identity: str) -> None:
        super().__init__()
        self.model, self.identity = model, identity
        self.num_features = int(model.config.hidden_size)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Extracted:
        """The class token's features; `images` as in `Features.__call__`, of any size."""
        return Extracted(self._hidden(images)[:, 0])

    @torch.no_grad()
    def grid_tokens(self, images: Tensor) -> Tensor:
        """The normalized patch tokens [N, E, h, w] of images, without the class token, for REPA.

        A square image is resized to 224 x 224 pixels; another aspect ratio is preserved with about as many tokens.
        """
        patch = int(self.model.config.patch_size)
        stretch = math.sqrt(images.shape[2] / images.shape[3])
        grid = tuple(max(1, round(SIDE // patch * factor)) for factor in (stretch, 1 / stretch))
        tokens = self._hidden(images, (patch * grid[0], patch * grid[1]))[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, grid)

    def token_flops(self) -> float:
        """FLOPs of one image's forward pass without the products of attention scores (about a tenth)."""
        tokens = (SIDE // int(self.model.config.patch_size)) ** 2 + 1
        return 2.0 * tokens * sum(p.numel() for p in self.model.encoder.parameters())

    def _hidden(self, images: Tensor, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
        """The last normalized layer [N, 1 + S, E] float32."""
        mean = self.get_buffer("mean")
        x = as_rgb(images).to(mean.device).float() / 255
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        output = self.model(pixel_values=(x - mean) / self.get_buffer("std"))
        return output.last_hidden_state.float()


def load_dino(folder: str | Path, device: torch.device | str = "cpu") -> DinoV2:
    """The network in a transformers folder (config.json, model.safetensors). `ArtifactError` for other content."""
    from transformers import Dinov2Model

    folder = Path(folder)
    weights = folder / "model.safetensors"
    if not (folder / "config.json").is_file() or not weights.is_file():
        raise ArtifactError(
            f"{folder} has no config.json and model.safetensors; FDD needs DINOv2 as published for transformers "
            "(facebook/dinov2-large): download that folder and give its path"
        )
    try:
        loaded: Any = Dinov2Model.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many types for a damaged folder
        first = str(error).strip().partition("\n")[0][:200]
        raise ArtifactError(f"{folder}: no DINOv2 can be loaded: {first}") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing or model.config.model_type != "dinov2":
        raise ArtifactError(
            f"{folder} is no DINOv2: {len(missing)} of its tensors are missing ({', '.join(missing[:4])})"
        )
    return DinoV2(model.eval().requires_grad_(False), sha256_of(weights)).to(device)
