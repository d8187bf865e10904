"""Statistics of a set of images for all metrics, collected in one pass by one or several processes.

Shapes: B images of a batch, F pooled features, S spatial features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fine_dist.core.config import expand_path
from fine_dist.core.errors import DataError
from fine_dist.evaluation.feature_network import Features
from fine_dist.evaluation.image_reader import Images, open_images
from fine_dist.evaluation.moments import Moments
from fine_dist.evaluation.scores import IS_SPLIT, ClassSums
from fine_dist.sampling.npz import has_statistics, read_statistics

SUBSET = 10_000
"""Number of images whose features are kept for precision, recall and KID, as in the literature."""


@dataclass(frozen=True)
class Gaussian:
    """Mean [F] and covariance [F, F], in the dtype they came in."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Statistics:
    """Statistics of a set of images under one network.

    source:    where the images came from.
    count:     number of images; None if a statistics file does not contain it.
    features:  name of the network.
    identity:  sha256 of the network's weights; None if a statistics file does not contain it.
    distance:  name of the Fréchet distance on its pooled features.
    pooled, spatial: Gaussians for Fréchet distances.
    kept:      features [up to `Selection.keep`, F] float32 of a random subset, in the order of the images' numbers.
    classes:   mean and standard deviation of the Inception Score.
    accuracy:  fraction of images that the network assigns to their label; None without labels.
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
    accuracy: float | None = None


@dataclass(frozen=True)
class Selection:
    """The images of a set that are used for precision, recall and KID, and the parts of the Inception Score.

    Sets are often sorted by class (one folder for each class; samples drawn class by class), so that their first images
    belong to a few classes. Therefore the kept features are those of a random subset, the same in every process.

    keep:        number of images whose features are kept; 0 keeps none, None all.
    seed:        seed of the random subset and of the parts.
    consecutive: whether the parts of the Inception Score are consecutive images, as in ADM's script, and not random.
    """

    keep: int | None = SUBSET
    seed: int = 0
    consecutive: bool = False

    def subset(self, count: int) -> Tensor:
        """Numbers [K] int64, ascending, of the images that are kept of `count`."""
        if self.keep is None or self.keep >= count:
            return torch.arange(count)
        return self._order(count)[: self.keep].sort().values

    def parts(self, count: int) -> Tensor:
        """The part of `IS_SPLIT` images of the Inception Score to which each image belongs, [count] int64."""
        if self.consecutive or count <= IS_SPLIT:
            return torch.arange(count) // IS_SPLIT
        # The inverse of the permutation: image order[i] belongs to part i // IS_SPLIT.
        return torch.empty(count, dtype=torch.int64).scatter_(0, self._order(count), torch.arange(count) // IS_SPLIT)

    def _order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))


class Collector:
    """Collects statistics of batches in any order and any number of processes: `add`, `all_reduce`, then `result`.

    Every image must be added once. `num_images` is the size of the complete set, over all processes.
    """

    def __init__(
        self, features: Features, num_images: int, selection: Selection = Selection(), source: str = "samples"
    ) -> None:
        self.features, self.num_images, self.source = features, num_images, source
        self.pooled = Moments.empty(features.num_features)
        self.spatial: Moments | None = None
        self.classes: ClassSums | None = None
        chosen = selection.subset(num_images)
        # Computed for the complete set in every process, so that processes need not exchange their image numbers.
        self._part = selection.parts(num_images)
        # row of each image in the table of kept features; -1 for images that are not in the subset
        self._row = torch.full((num_images,), -1).scatter_(0, chosen, torch.arange(len(chosen)))
        self._table = torch.zeros(len(chosen), features.num_features)
        self._right = torch.zeros(2, dtype=torch.int64)  # images with their label, images that have one

    def add(self, numbers: Tensor, images: Tensor, labels: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            numbers: Number of each image in the set, [B], 0..num_images-1.
            images: Images as the network takes them.
            labels: Classes of the samples, [B], for the accuracy.
        """
        extracted, numbers = self.features(images), numbers.cpu()
        self.pooled.update(extracted.pooled)
        if extracted.spatial is not None:
            self.spatial = (self.spatial or Moments.empty(extracted.spatial.shape[1])).update(extracted.spatial)
        if extracted.logits is not None:
            self.classes = self.classes or ClassSums.empty(self.num_images, extracted.logits.shape[1])
            self.classes.update(extracted.logits, self._part[numbers])
            if labels is not None:
                right = extracted.logits.argmax(dim=1).cpu() == labels.cpu()
                self._right += torch.tensor([int(right.sum()), len(labels)])
        rows = self._row[numbers]
        in_subset = rows >= 0
        if in_subset.any():
            self._table[rows[in_subset]] = extracted.pooled.cpu()[in_subset].float()

    def all_reduce(self, device: torch.device | str = "cpu") -> Collector:
        """Merge over all processes of the default group; every process gets the same result. Returns itself."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        # A collective must be called by all processes or by none. A process without images does not know whether the
        # network has spatial features and logits, so the processes first agree on their sizes.
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
        right = self._right.to(device)
        dist.all_reduce(right)
        self._right = right.cpu()
        if len(self._table):
            # each process has written its own rows and left the others zero, so the sum is the complete table
            table = self._table.to(device)
            dist.all_reduce(table)
            self._table = table.cpu()
        return self

    def result(self) -> Statistics:
        """The statistics. `DataError` for fewer than 2 images, or if their number is not `num_images`."""
        # A missing or repeated image would change every score a little.
        if self.pooled.count != self.num_images:
            raise DataError(f"{self.source}: {self.pooled.count} images were measured, and {self.num_images} announced")
        return Statistics(
            source=self.source,
            count=self.pooled.count,
            features=self.features.name,
            distance=self.features.distance,
            identity=self.features.identity or None,
            pooled=Gaussian(self.pooled.mean, self.pooled.covariance()),
            spatial=Gaussian(self.spatial.mean, self.spatial.covariance()) if self.spatial is not None else None,
            kept=self._table if len(self._table) else None,
            classes=self.classes.score() if self.classes is not None else None,
            accuracy=int(self._right[0]) / int(self._right[1]) if self._right[1] else None,
        )


def measure(
    features: Features,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_images: int,
    source: str = "samples",
    selection: Selection = Selection(),
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Statistics:
    """Statistics of batches (numbers [B], images); each of several processes passes its own batches.

    Args:
        features: The network.
        batches: Numbers and images of each batch.
        num_images: Number of images over all processes.
        source: Description of the images, for messages.
        selection: Images for precision, recall, KID and the parts of the Inception Score.
        device: Device of the collectives.
        progress: Whether to show a progress bar.
    """
    collector = Collector(features, num_images, selection, source)
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
    selection: Selection = Selection(),
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    progress: bool = False,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Statistics:
    """Statistics of the images at a path (read by `image_reader`); process `rank` of `world_size` reads its share.

    Args:
        background: What transparent pictures are laid over.
    """
    images = open_images(path, background)
    start, stop = images.count * rank // world_size, images.count * (rank + 1) // world_size
    return measure(
        features,
        images.batches(batch, start, stop),
        num_images=images.count,
        source=str(path),
        selection=selection,
        device=device,
        progress=progress,
    )


def reference(
    features: Features,
    path: str | Path,
    *,
    batch: int = 64,
    selection: Selection = Selection(),
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> Statistics:
    """Reference statistics: of an `.npz` that holds them (ADM's `mu, sigma, mu_s, sigma_s`), or of images at a path.

    A file that also contains images (`arr_0`) provides the kept features as well. `options` are those of
    `measure_path`. `DataError` when the statistics have another number of features than the network.
    """
    path = expand_path(str(path))
    if not (path.endswith(".npz") and has_statistics(path)):
        return measure_path(
            features, path, batch=batch, selection=selection, rank=rank, world_size=world_size, **options
        )
    stored = read_statistics(path)
    if len(stored.mu) != features.num_features:
        raise DataError(f"{path}: statistics of {len(stored.mu)} features; {features.name} has {features.num_features}")
    spatial = None
    if stored.mu_s is not None and stored.sigma_s is not None:
        spatial = Gaussian(torch.from_numpy(stored.mu_s), torch.from_numpy(stored.sigma_s))
    return Statistics(
        source=path,
        count=None,
        features=features.name,
        distance=features.distance,
        identity=None,
        pooled=Gaussian(torch.from_numpy(stored.mu), torch.from_numpy(stored.sigma)),
        spatial=spatial,
        kept=_features_of_subset(features, path, selection, batch, rank, world_size, **options),
    )


def _features_of_subset(
    features: Features, path: str, selection: Selection, batch: int, rank: int, world_size: int, **options: Any
) -> Tensor | None:
    """Features of the subset of a statistics file's images; None if the file has no images."""
    options.pop("background", None)
    try:
        images = open_images(path)
    except DataError as error:
        if "arr_0" not in str(error):
            raise
        return None
    chosen = selection.subset(images.count)
    if not len(chosen):
        return None
    start, stop = images.count * rank // world_size, images.count * (rank + 1) // world_size
    batches = _only(chosen, images, batch, start, stop)
    return measure(
        features, batches, num_images=len(chosen), source=path, selection=Selection(keep=None), **options
    ).kept


def _only(chosen: Tensor, images: Images, batch: int, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The chosen images among start..stop-1, numbered by their index in `chosen`."""
    for numbers, part in images.batches(batch, start, stop):
        wanted = torch.isin(numbers, chosen)
        if wanted.any():
            yield torch.searchsorted(chosen, numbers[wanted]), part[wanted]
