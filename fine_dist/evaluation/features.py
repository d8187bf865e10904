"""Feature networks by name, each loaded from where its weights lie."""

from __future__ import annotations

from pathlib import Path

import torch

from fine_dist.core.errors import ConfigError, nearest
from fine_dist.evaluation.classifier import load_classifier
from fine_dist.evaluation.dino import load_dino
from fine_dist.evaluation.feature_network import Features
from fine_dist.evaluation.inception import PUBLISHED, WEIGHTS_URL, load_inception

NAMES = {
    "inception": f"the file {PUBLISHED} (91 MB); download it from {WEIGHTS_URL} and give its path with "
    "--features.inception FILE",
    "dinov2": "a local transformers folder of DINOv2; `hf download facebook/dinov2-large --local-dir DIR` makes one; "
    "give it with --features.dinov2 DIR",
    "classifier": "the folder of a classifier trained on the images at hand; --features.classifier train trains one on "
    "data.shards",
}
"""Every network: what its weights are, where they come from, and which flag takes them."""


def load_features(name: str, weights: str | Path | None, device: torch.device | str = "cpu") -> Features:
    """A network of `NAMES` with its weights, in eval mode on a device.

    Args:
        name: `inception`, `dinov2` or `classifier`.
        weights: A file or folder, as `NAMES` says.
        device: Where it runs.

    Raises:
        ConfigError: For another name, or no weights.
        ArtifactError: When the weights are missing, damaged or another network's.
    """
    if name not in NAMES:
        raise ConfigError(f"features {name!r}; {nearest(name, NAMES)}")
    if weights is None:
        raise ConfigError(f"features.{name}: weights are needed: {NAMES[name]}")
    if name == "inception":
        return load_inception(str(weights), device)
    if name == "dinov2":
        return load_dino(str(weights), device)
    return load_classifier(str(weights)).classifier.to(device)
