"""Metrics of images: FID, sFID, Inception Score, precision, recall, KID, FDD and their kin.

    network = load_features("inception", path)               # or dinov2, efflite, classifier: `features.NAMES`
    real = reference(network, "VIRTUAL_imagenet256_labeled.npz")           # statistics, or a folder, tar, npz of images
    fake = measure_path(network, "samples.npz")              # or `measure(network, batches, num_images=...)`
    scores = compare(fake, real, ["fid", "sfid", "is", "precision", "recall"])
    notes = cautions(fake, real, ...)                        # too few samples, say

`networks(metrics)` says which networks a list of metrics needs. With several processes, each gives its own batches
(`rank`, `world_size`) and all get the same statistics. `Moments` and `frechet_distance` do for features of one's own.
Names are loaded when they are asked for, so that importing this room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fine_dist.metrics.base import Extracted, Features
    from fine_dist.metrics.collect import Collector, Gaussian, Statistics, measure, measure_path, reference
    from fine_dist.metrics.comparison import Score, cautions, compare, networks
    from fine_dist.metrics.features import load_features
    from fine_dist.metrics.frechet import frechet_distance, frechet_from
    from fine_dist.metrics.images import open_images
    from fine_dist.metrics.moments import Moments
    from fine_dist.metrics.scores import inception_score, kernel_distance, precision_recall

_HOMES = {
    "base": ("Extracted", "Features"),
    "collect": ("Collector", "Gaussian", "Statistics", "measure", "measure_path", "reference"),
    "comparison": ("Score", "cautions", "compare", "networks"),
    "features": ("load_features",),
    "frechet": ("frechet_distance", "frechet_from"),
    "images": ("open_images",),
    "moments": ("Moments",),
    "scores": ("inception_score", "kernel_distance", "precision_recall"),
}
__all__ = [
    "Collector",
    "Extracted",
    "Features",
    "Gaussian",
    "Moments",
    "Score",
    "Statistics",
    "cautions",
    "compare",
    "frechet_distance",
    "frechet_from",
    "inception_score",
    "kernel_distance",
    "load_features",
    "measure",
    "measure_path",
    "networks",
    "open_images",
    "precision_recall",
    "reference",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"fine_dist.metrics.{home}"), name)
    raise AttributeError(f"module 'fine_dist.metrics' has no attribute {name!r}")
