"""What metrics need of a set of images, gathered in one pass, by one process or several.

Shapes: B images of a batch, F pooled features, S spatial ones, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fine_dist.core.config import expand_path
from fine_dist.core.errors import DataError
from fine_dist.evaluation.base import Features
from fine_dist.evaluation.image_reader import open_images
from fine_dist.evaluation.moments import Moments
from fine_dist.evaluation.scores import ClassSums
from fine_dist.sampling.npz import has_statistics, read_statistics

KEPT = 10_000
"""Images whose features are kept, for precision, recall and KID: the first ones by number."""


@dataclass(frozen=True)
class Gaussian:
    """Mean [F] and covariance [F, F], in the dtype they came in."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Statistics:
    """Of a set of images under one network.

    source:    where the images came from.
    count:     how many; none where a statistics file does not say.
    features:  the network's name; identity: sha256 of its weights (none: a statistics file does not say).
    distance:  what a Fréchet distance on it is called.
    pooled, spatial: for Fréchet distances.   kept: features [up to KEPT, F] float32.
    classes:   Inception Score's mean and standard deviation.
    """

    source: str
    count: int | None
    features: str
    distance: str
    identity: str | None
    pooled: Gaussian
    spatial: Gaussian | None = None
    kept: Tensor | None = None
    classes: tuple[float, float] | None = None


class Collector:
    """Takes batches in any order and number of processes: `add` each image once, then `all_reduce`, then `result`.

    num_images: of the whole set, over all processes. keep: how many features to keep (0: none).
    """

    def __init__(self, features: Features, num_images: int, keep: int = KEPT, source: str = "samples") -> None:
        self.features, self.num_images, self.keep, self.source = features, num_images, keep, source
        self.pooled = Moments.empty(features.num_features)
        self.spatial: Moments | None = None
        self.classes: ClassSums | None = None
        self._kept: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def add(self, numbers: Tensor, images: Tensor) -> None:
        """numbers [B]: each image's place in the set, 0..num_images-1; images as the network takes them."""
        found = self.features(images)
        self.pooled.update(found.pooled)
        if found.spatial is not None:
            self.spatial = (self.spatial or Moments.empty(found.spatial.shape[1])).update(found.spatial)
        if found.logits is not None:
            self.classes = self.classes or ClassSums.empty(self.num_images, found.logits.shape[1])
            self.classes.update(found.logits, numbers)
        first = numbers < self.keep
        if first.any():
            self._kept.append(found.pooled.cpu()[first].float())
            self._numbers.append(numbers[first].cpu())

    def all_reduce(self, device: torch.device | str = "cpu") -> Collector:
        """Merge over all processes of the default group; every process gets the same. Returns itself.

        A process without images still takes part: all agree first on what the network gives.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        sides = torch.zeros(2, dtype=torch.int64)
        if self.spatial is not None:
            sides[0] = len(self.spatial.mean)
        if self.classes is not None:
            sides[1] = self.classes.classes.shape[1]
        sides = sides.to(device)
        dist.all_reduce(sides, op=dist.ReduceOp.MAX)
        self.pooled.all_reduce(device)
        if int(sides[0]):
            self.spatial = (self.spatial or Moments.empty(int(sides[0]))).all_reduce(device)
        if int(sides[1]):
            self.classes = self.classes or ClassSums.empty(self.num_images, int(sides[1]))
            self.classes.all_reduce(device)
        if self.keep:
            self._gather(device)
        return self

    def _gather(self, device: torch.device | str) -> None:
        """Each process writes its rows into one table, and tables are added: no row has two writers."""
        table = torch.zeros(min(self.keep, self.num_images), self.features.num_features)
        for numbers, rows in zip(self._numbers, self._kept):
            table[numbers] = rows
        table = table.to(device)
        dist.all_reduce(table)
        self._kept, self._numbers = [table.cpu()], [torch.arange(len(table))]

    def result(self) -> Statistics:
        """The statistics. `DataError` for fewer than 2 images, or other than were announced."""
        if self.pooled.count != self.num_images:
            raise DataError(f"{self.source}: {self.pooled.count} images were measured, and {self.num_images} announced")
        kept = None
        if self._kept:
            order = torch.cat(self._numbers).argsort()
            kept = torch.cat(self._kept)[order]
        return Statistics(
            source=self.source,
            count=self.pooled.count,
            features=self.features.name,
            distance=self.features.distance,
            identity=self.features.identity or None,
            pooled=Gaussian(self.pooled.mean, self.pooled.covariance()),
            spatial=Gaussian(self.spatial.mean, self.spatial.covariance()) if self.spatial is not None else None,
            kept=kept,
            classes=self.classes.score() if self.classes is not None else None,
        )


def measure(
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_images: int,
    source: str = "samples",
    keep: int = KEPT,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Statistics:
    """Statistics of batches (numbers [B], images); with several processes each gives its own batches.

    device: where the processes communicate.
    """
    from tqdm import tqdm

    collector = Collector(features, num_images, keep, source)
    with tqdm(
        total=num_images, desc=features.name, unit="image", disable=None if progress else True, leave=False
    ) as bar:
        for numbers, images in batches:
            collector.add(numbers, images)
            bar.update(len(images))
    return collector.all_reduce(device).result()


def measure_path(
    features: Features,
    path: str | Path,
    *,
    batch: int = 64,
    keep: int = KEPT,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Statistics:
    """Statistics of the images at a path (read by `image_reader`); process `rank` of `world_size` reads its share.

    limit: only the first so many images.
    """
    images = open_images(path)
    total = images.count if limit is None else min(limit, images.count)
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    return measure(
        features,
        images.batches(batch, start, stop),
        num_images=total,
        source=str(path),
        keep=keep,
        device=device,
        progress=progress,
    )


def reference(features: Features, path: str | Path, *, keep: int = KEPT, **options: Any) -> Statistics:
    """Reference statistics: of an `.npz` that holds them (ADM's `mu, sigma, mu_s, sigma_s`), or of images at a path.

    A file that holds images as well (`arr_0`) gives the kept features, too, when `keep` is not 0. options: as
    `measure_path`. `DataError` when the statistics are of another number of features than the network has.
    """
    path = expand_path(str(path))
    if not (path.endswith(".npz") and has_statistics(path)):
        return measure_path(features, path, keep=keep, **options)
    found = read_statistics(path)
    if len(found.mu) != features.num_features:
        raise DataError(f"{path}: statistics of {len(found.mu)} features; {features.name} has {features.num_features}")
    try:
        kept = measure_path(features, path, keep=keep, limit=keep, **options).kept if keep else None
    except DataError as error:
        if "arr_0" not in str(error):
            raise
        kept = None
    spatial = None
    if found.mu_s is not None and found.sigma_s is not None:
        spatial = Gaussian(torch.from_numpy(found.mu_s), torch.from_numpy(found.sigma_s))
    return Statistics(
        source=path,
        count=None,
        features=features.name,
        distance=features.distance,
        identity=None,
        pooled=Gaussian(torch.from_numpy(found.mu), torch.from_numpy(found.sigma)),
        spatial=spatial,
        kept=kept,
    )
